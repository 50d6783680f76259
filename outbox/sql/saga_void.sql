-- Purpose: which intents must not be applied, and whether their saga knows of that.
-- Locks: none. Tables: outbox.saga_void (read). Called by: outbox.saga.report.void.
select id, answered from outbox.saga_void where id = any(%(ids)s)
