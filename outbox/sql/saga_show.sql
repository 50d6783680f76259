-- Purpose: one saga. Locks: none. Tables: outbox.saga, outbox.saga_plan, outbox.saga_lock (read).
-- Called by: outbox.saga.view.show.
select s.id, s.name, s.version, s.shape, s.key, s.state, s.decision, s.reason, s.parent, s.input, s.started_at,
       s.ended_at,
       extract(epoch from coalesce(s.ended_at, outbox.now()) - s.started_at)::float8 as seconds,
       coalesce((select p.nodes from outbox.saga_plan p
                  where p.name = s.name and p.version = s.version and p.shape = s.shape), '[]') as nodes,
       array(select l.name || case when l.held then '' else ' (waits)' end
               from outbox.saga_lock l where l.saga = s.id order by l.name) as locks,
       array(select c.id::text from outbox.saga c where c.parent = s.id order by c.started_at) as children
  from outbox.saga s where s.id = %(id)s
