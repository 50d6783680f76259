-- Purpose: intents by id, for what is parked or in doubt; of a participant that was rebuilt, also rows of the base.
-- Locks: none. Tables: outbox.log, outbox.base, outbox.horizon (read). Called by: outbox.log.fetch.
select id, target, action, key, payload::text, due, saga, headers::text
  from outbox.log where id = any(%(ids)s)
union all
select id, target, 'put', key, payload::text, null, null, headers::text
  from outbox.base where id = any(%(ids)s) and id < (select h.id from outbox.horizon h)
 order by id
