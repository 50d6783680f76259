-- Purpose: messages in the hands of a consumer that is gone are tried again, by whoever has their lane.
-- Locks: rows of outbox.parked; the lanes' rows (share). Tables: outbox.parked (update), outbox.lane (lock),
--   outbox.consumer (read). Called by: workers.actor.share.
with fence as (
  select l.target, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[])) for share
)
update outbox.parked p
   set reason = 'retry', retry_at = outbox.now(), error = 'its worker died while it was in hand'
  from fence f
 where p.reason = 'running' and p.target = f.target and p.slot between f.slot_low and f.slot_high
   and not exists (select from outbox.consumer c where c.target = p.target and c.owner = p.holder)
returning p.id
