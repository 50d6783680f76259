-- Purpose: what came before the starts of sagas, in order.
-- Locks: none: only the owner of the lane changes it. Tables: outbox.saga_early (read).
-- Called by: outbox.saga.store.early, in the engine's transaction.
select id, saga, action, payload::text from outbox.saga_early where saga = any(%(ids)s) order by id
