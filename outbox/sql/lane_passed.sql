-- Purpose: the newest tick that every lane of a target has passed: all intents before it are applied, or parked.
-- Locks: none. Tables: outbox.lane, outbox.position, outbox.tick (read). Called by: workers.resilver.
select t.id, t.floor, t.low, t.high, t.snapshot::text, t.nonce, t.at, t.first
  from outbox.tick t
 where t.id <= (
       select min(coalesce(p.tick, (select min(id) from outbox.tick)))
         from outbox.lane l
         left join lateral (select tick from outbox.position p
                             where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
        where l.target = %(target)s)
 order by t.id desc limit 1
