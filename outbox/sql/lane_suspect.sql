-- Purpose: after deaths: note the first intent of the batch that is about to be applied, so that the next death
--   counts only if it comes with a batch in hand. No row comes back if the epoch is stale.
-- Locks: the lane row. Tables: outbox.lane (update). Called by: outbox.lane.suspect.
update outbox.lane set suspect = %(id)s
 where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s
returning epoch
