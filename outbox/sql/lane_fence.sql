-- Purpose: hold the lane against a new owner until this transaction ends. No row if the epoch is stale.
-- Locks: the lane row (share), until commit. Tables: outbox.lane (lock). Called by: outbox.lane.fence.
select epoch from outbox.lane where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
