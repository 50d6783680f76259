-- Purpose: write sagas that have changed, each over the revision that it was computed from.
-- Locks: rows of outbox.saga. Tables: outbox.saga (update). Called by: outbox.saga.store.save.
update outbox.saga s
   set state = n.state, decision = n.decision, signals = array(select jsonb_array_elements_text(n.signals)),
       reason = n.reason, revision = s.revision + 1, ended_at = case when n.ended then (select outbox.now()) end
  from unnest(%(id)s::uuid[], %(revision)s::int[], %(state)s::text[], %(decision)s::text[], %(signals)s::jsonb[],
              %(reason)s::text[], %(ended)s::bool[])
       as n (id, revision, state, decision, signals, reason, ended)
 where s.id = n.id and s.revision = n.revision
