-- Purpose: append how far the lane is. No row comes back if the epoch is stale; a claim that comes in between
--   waits for this transaction, or this statement finds the new epoch.
-- Locks: the lane row (share), until commit. Tables: outbox.position (insert), outbox.lane (lock).
-- Called by: outbox.lane.advance.
with fence as (
  select from outbox.lane where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
)
insert into outbox.position (target, lane, epoch, tick, upto, after, own)
select %(target)s, %(lane)s, %(epoch)s, %(tick)s, %(upto)s, %(after)s, %(own)s from fence
returning seq
