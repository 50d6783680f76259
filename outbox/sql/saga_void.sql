-- Purpose: which intents must not be applied.
-- Locks: none. Tables: outbox.saga_void (read). Called by: outbox.saga.report.void.
select id from outbox.saga_void where id = any(%(ids)s)
