-- Purpose: parked intents whose time has come, counted as tried before they are tried, so that one which kills
--   its worker doesn't come back at once and for ever.
-- Locks: the rows returned. Tables: outbox.parked (update), outbox.lane (lock). Called by: outbox.parked.take.
with fence as (
  select slot_low, slot_high from outbox.lane
   where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
), ready as (
  select p.id from outbox.parked p, fence
   where p.target = %(target)s and p.slot between fence.slot_low and fence.slot_high
     and p.retry_at <= outbox.now()
   order by p.retry_at, p.id limit %(limit)s
     for update of p
)
update outbox.parked p
   set attempts = p.attempts + 1, retry_at = outbox.now() + make_interval(secs => %(wait)s)
  from ready where p.id = ready.id
returning p.id, p.attempts
