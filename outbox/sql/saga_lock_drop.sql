-- Purpose: give locks back, held or waited for. → their names.
-- Locks: rows of outbox.saga_lock; the caller holds the advisory lock. Tables: outbox.saga_lock (delete).
-- Called by: outbox.saga.locks.
delete from outbox.saga_lock where saga = any(%(ids)s) returning name
