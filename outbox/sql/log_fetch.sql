-- Purpose: intents by id, for what is parked or in doubt.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.log.fetch.
select id, target, action, key, payload::text, due, saga, headers::text
  from outbox.log where id = any(%(ids)s) order by id
