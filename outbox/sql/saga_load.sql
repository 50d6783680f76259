-- Purpose: sagas by id. Locks: none: only the owner of the lane changes them, and the revision is compared.
-- Tables: outbox.saga (read). Called by: outbox.saga.store.load.
select id, name, version, shape, key, state, decision, revision, input::text, signals, reason, parent, parent_intent
  from outbox.saga where id = any(%(ids)s)
