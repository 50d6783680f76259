-- Purpose: what the participant held itself when the lane's position was written last.
-- Locks: none. Tables: outbox.position (read). Called by: outbox.lane.own.
select own from outbox.position where target = %(target)s and lane = %(lane)s order by seq desc limit 1
