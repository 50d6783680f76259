-- Purpose: parked intents whose time has come; or one of those that killed a worker, alone. Each is counted as
--   tried, and as one more death, before it is tried; recording the outcome takes the death back. One that an operator
--   decides about at this moment is left for the next look; and one that the lane reads again, for later: it has passed
--   what tick `start` shows, and of the batch to tick `end` what is not after an id.
-- Locks: the rows returned; the lane row (share). Tables: outbox.parked (update), outbox.lane (lock), outbox.log (read).
-- Called by: outbox.parked.take.
with fence as (
  select epoch, slot_low, slot_high from outbox.lane
   where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
), ready as (
  select p.id from fence cross join outbox.parked p
    -- Null: it is in the base, and so older than any transaction in the log.
    left join outbox.log l on l.id = p.id
   where p.target = %(target)s and p.slot between fence.slot_low and fence.slot_high
     and p.retry_at <= outbox.now() and (p.deaths > 0) = %(deadly)s
     and (outbox.shows(%(first)s, %(high)s, %(start)s, coalesce(l.xid, '0'), p.id)
          or p.id <= %(after)s and outbox.shows(%(end_first)s, %(end_high)s, %(end)s, coalesce(l.xid, '0'), p.id))
   order by p.retry_at, p.id limit %(limit)s
     for update of p skip locked
)
update outbox.parked p
   set attempts = p.attempts + 1, deaths = p.deaths + 1, trying = fence.epoch,
       retry_at = outbox.now() + make_interval(secs => %(wait)s)
  from ready, fence where p.id = ready.id
returning p.id, p.attempts, p.deaths, p.doubtful
