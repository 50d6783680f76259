-- Purpose: the newest tick. Locks: none. Tables: outbox.tick (read). Called by: outbox.tick.latest.
select id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick order by id desc limit 1
