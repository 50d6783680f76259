-- Purpose: intents that were recalled too late: they are done, and a participant that is rebuilt applies them.
-- Locks: rows of outbox.saga_void. Tables: outbox.saga_void (delete). Called by: outbox.saga.store.save.
delete from outbox.saga_void where id = any(%(ids)s)
