-- Purpose: keep a lease, or take one up again that has run out and that nobody claimed. No row comes back if the
--   epoch is stale, or if nothing may go on in this era.
-- Locks: the lane row. Tables: outbox.lane (update), outbox.era (read). Called by: outbox.lane.renew.
update outbox.lane set lease_until = outbox.now() + make_interval(secs => %(ttl)s)
 where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s and owner is not null
   and outbox.goes_on()
returning epoch
