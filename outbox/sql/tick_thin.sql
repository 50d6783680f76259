-- Purpose: delete ticks older than the given age, except the last one of each nonce: a position at a thinned tick can
--   then still be matched with this log. Of those before the horizon, where no position is that can go on, these go
--   too. Kept are the first tick, the horizon's, and those that a lane or a follower stands at. Any subset of ticks is
--   a valid set of boundaries.
-- Locks: rows of outbox.tick. Tables: outbox.tick (delete), outbox.position, outbox.follower, outbox.horizon (read).
-- Called by: workers.clock.
with newest as (
  select distinct on (target, lane) target, lane, tick, upto from outbox.position order by target, lane, seq desc
)
delete from outbox.tick t
 using outbox.horizon h
 where t.at < outbox.now() - %(age)s::interval
   and (t.id < h.tick
        or exists (select from outbox.tick n where n.id = (select min(id) from outbox.tick where id > t.id)
                                               and n.nonce = t.nonce))
   and t.id <> h.tick and t.id <> (select min(id) from outbox.tick)
   and not exists (select from newest p where t.id in (p.tick, p.upto))
   and not exists (select from outbox.follower f where f.tick = t.id)
