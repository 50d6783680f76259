-- Purpose: keep what came before the start of its saga.
-- Locks: none beyond an INSERT's. Tables: outbox.saga_early (insert). Called by: outbox.saga.store.keep.
insert into outbox.saga_early (id, saga, action, payload)
select n.id, n.saga, n.action, n.payload
  from unnest(%(id)s::bigint[], %(saga)s::uuid[], %(action)s::text[], %(payload)s::jsonb[])
       as n (id, saga, action, payload)
on conflict do nothing
