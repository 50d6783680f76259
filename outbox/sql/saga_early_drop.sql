-- Purpose: forget what a start has taken along.
-- Locks: rows of outbox.saga_early. Tables: outbox.saga_early (delete). Called by: outbox.saga.store.keep.
delete from outbox.saga_early where saga = any(%(ids)s)
