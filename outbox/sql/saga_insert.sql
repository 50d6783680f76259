-- Purpose: write sagas that begin. Locks: none beyond an INSERT's. Tables: outbox.saga (insert).
-- Called by: outbox.saga.store.save.
insert into outbox.saga (id, name, version, shape, key, state, decision, input, signals, reason, parent, parent_intent,
                         started_at, ended_at)
select n.id, n.name, n.version, n.shape, n.key, n.state, n.decision, n.input,
       array(select jsonb_array_elements_text(n.signals)), n.reason, n.parent, n.parent_intent,
       (select outbox.now()), case when n.ended then (select outbox.now()) end
  from unnest(%(id)s::uuid[], %(name)s::text[], %(version)s::int[], %(shape)s::text[], %(key)s::text[],
              %(state)s::text[], %(decision)s::text[], %(input)s::jsonb[], %(signals)s::jsonb[], %(reason)s::text[],
              %(parent)s::uuid[], %(parent_intent)s::bigint[], %(ended)s::bool[])
       as n (id, name, version, shape, key, state, decision, input, signals, reason, parent, parent_intent, ended)
