-- Purpose: set timers, each in place of an earlier one of its step and kind.
-- Locks: rows of outbox.saga_timer. Tables: outbox.saga_timer (insert, update). Called by: outbox.saga.store.save.
insert into outbox.saga_timer (saga, step, what, round, tries, slot, due)
select n.saga, n.step, n.what, n.round, n.tries, outbox.slot(n.saga::text),
       outbox.now() + make_interval(secs => n.seconds)
  from unnest(%(saga)s::uuid[], %(step)s::text[], %(what)s::text[], %(round)s::int[], %(tries)s::int[],
              %(seconds)s::float8[]) as n (saga, step, what, round, tries, seconds)
on conflict (saga, step, what) do update
   set round = excluded.round, tries = excluded.tries, due = excluded.due
