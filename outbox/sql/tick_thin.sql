-- Purpose: delete ticks older than the given age, except the last one of each nonce and those that a lane
--   stands at. Any subset of ticks is a valid set of boundaries; the last of each nonce is kept so that a
--   position at a thinned tick can still be matched with this log.
-- Locks: rows of outbox.tick. Tables: outbox.tick (delete), outbox.position (read). Called by: workers.clock.
with newest as (
  select distinct on (target, lane) target, lane, tick, upto from outbox.position order by target, lane, seq desc
)
delete from outbox.tick t
 where t.at < outbox.now() - %(age)s::interval
   and exists (select from outbox.tick n where n.id = (select min(id) from outbox.tick where id > t.id)
                                           and n.nonce = t.nonce)
   and not exists (select from newest p where t.id in (p.tick, p.upto))
