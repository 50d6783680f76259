-- Purpose: where the log begins. Locks: none. Tables: outbox.horizon, outbox.tick (read). Called by: outbox.horizon.read.
select id, tick, moved, (select min(t.id) from outbox.tick t) from outbox.horizon
