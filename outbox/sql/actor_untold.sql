-- Purpose: messages of our lanes that an operator has skipped, and of which nobody has been told: they count as told.
-- Locks: rows of outbox.parked; the lanes' rows (share). Tables: outbox.parked (update), outbox.lane (lock), outbox.log
--   (read). Called by: workers.actor.ending.
with fence as (
  select l.target, l.lane, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[])) for share
), told as (
  update outbox.parked p set untold = false
   where p.id = any (array(
           select u.id from outbox.parked u
             join fence f on f.target = u.target and u.slot between f.slot_low and f.slot_high
            where u.target = any (%(targets)s::text[]) and u.untold
            order by u.id limit %(limit)s for update of u skip locked))
  returning p.id
)
select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text
  from told t join outbox.log l on l.id = t.id
