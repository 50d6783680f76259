-- Purpose: a follower has gone on, or was seen where it is.
-- Locks: the follower's row. Tables: outbox.follower (update). Called by: outbox.follower.move.
update outbox.follower set tick = greatest(tick, %(tick)s), seen_at = outbox.now() where name = %(name)s returning tick
