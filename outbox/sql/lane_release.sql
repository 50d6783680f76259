-- Purpose: give a lane back, so that the next owner needn't wait for the lease to run out.
-- Locks: the lane row. Tables: outbox.lane (update). Called by: outbox.lane.release.
update outbox.lane set owner = null, place = null, lease_until = null
 where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s
returning epoch
