-- Purpose: note what happened beyond the plain way.
-- Locks: none beyond an INSERT's. Tables: outbox.saga_event (insert). Called by: outbox.saga.store.save.
insert into outbox.saga_event (saga, step, what, detail, who)
select n.saga, n.step, n.what, n.detail, n.who
  from unnest(%(saga)s::uuid[], %(step)s::text[], %(what)s::text[], %(detail)s::text[], %(who)s::text[])
       with ordinality as n (saga, step, what, detail, who, place)
 order by n.place
