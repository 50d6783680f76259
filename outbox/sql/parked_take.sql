-- Purpose: parked intents whose time has come; or one of those that killed a worker, alone. Each is counted as
--   tried, and as one more death, before it is tried; recording the outcome takes the death back. One that an operator
--   decides about at this moment is left for the next look.
-- Locks: the rows returned; the lane row (share). Tables: outbox.parked (update), outbox.lane (lock).
-- Called by: outbox.parked.take.
with fence as (
  select epoch, slot_low, slot_high from outbox.lane
   where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
), ready as (
  select p.id from outbox.parked p, fence
   where p.target = %(target)s and p.slot between fence.slot_low and fence.slot_high
     and p.retry_at <= outbox.now() and (p.deaths > 0) = %(deadly)s
   order by p.retry_at, p.id limit %(limit)s
     for update of p skip locked
)
update outbox.parked p
   set attempts = p.attempts + 1, deaths = p.deaths + 1, trying = fence.epoch,
       retry_at = outbox.now() + make_interval(secs => %(wait)s)
  from ready, fence where p.id = ready.id
returning p.id, p.attempts, p.deaths, p.doubtful
