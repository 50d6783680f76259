-- Purpose: the oldest tick, where a participant begins that holds nothing. Locks: none. Tables: outbox.tick (read).
-- Called by: outbox.tick.first.
select id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick order by id limit 1
