-- Purpose: give up messages that were in hand too often when their worker died: the last time alone, or very often.
-- Locks: rows of outbox.parked; the lanes' rows (share). Tables: outbox.parked (update), outbox.lane (lock), outbox.log
--   (read). Called by: workers.actor.ending.
with fence as (
  select l.target, l.lane, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[])) for share
)
update outbox.parked p set reason = 'poison', retry_at = null, error = %(error)s
  from fence f, outbox.log l
 where f.target = p.target and p.slot between f.slot_low and f.slot_high and l.id = p.id
   and p.reason in ('retry', 'due') and p.retry_at <= outbox.now()
   and (p.deaths >= %(most)s or (p.alone and p.deaths >= %(alone)s))
returning l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text
