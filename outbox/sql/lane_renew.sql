-- Purpose: keep a lease, or take one up again that has run out and that nobody claimed. No row comes back if the
--   epoch is stale.
-- Locks: the lane row. Tables: outbox.lane (update). Called by: outbox.lane.renew.
update outbox.lane set lease_until = outbox.now() + make_interval(secs => %(ttl)s)
 where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s and owner is not null
returning epoch
