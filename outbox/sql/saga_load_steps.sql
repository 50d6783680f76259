-- Purpose: the steps of sagas, in their order. Locks: none. Tables: outbox.saga_step (read).
-- Called by: outbox.saga.store.load.
select saga, step, state, round, tries, intent, result::text, error
  from outbox.saga_step where saga = any(%(ids)s) order by saga, place
