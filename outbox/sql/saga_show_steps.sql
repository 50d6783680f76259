-- Purpose: the steps of one saga, with when they are due and what their intent is parked for.
-- Locks: none. Tables: outbox.saga_step, outbox.saga_timer, outbox.parked (read). Called by: outbox.saga.view.show.
select t.step, t.state, t.round, t.tries, t.intent, t.error, t.began_at, t.ended_at,
       (select min(r.due) from outbox.saga_timer r where r.saga = t.saga and r.step = t.step) as due,
       (select p.reason from outbox.parked p where p.id = t.intent) as parked, t.result
  from outbox.saga_step t where t.saga = %(id)s order by t.place
