-- Purpose: write steps that have changed. The time is asked for once, not for each row.
-- Locks: rows of outbox.saga_step. Tables: outbox.saga_step (insert, update). Called by: outbox.saga.store.save.
with moment as materialized (select outbox.now() as now)
insert into outbox.saga_step as s (saga, step, place, state, round, tries, intent, result, error, began_at, ended_at)
select n.saga, n.step, n.place, n.state, n.round, n.tries, n.intent, n.result, n.error,
       case when n.round > 0 then moment.now end,
       case when n.state in ('done', 'failed', 'undone', 'skipped') then moment.now end
  from moment, unnest(%(saga)s::uuid[], %(step)s::text[], %(place)s::smallint[], %(state)s::text[], %(round)s::int[],
              %(tries)s::int[], %(intent)s::bigint[], %(result)s::jsonb[], %(error)s::text[])
       as n (saga, step, place, state, round, tries, intent, result, error)
on conflict (saga, step) do update
   set state = excluded.state, round = excluded.round, tries = excluded.tries, intent = excluded.intent,
       result = excluded.result, error = excluded.error, began_at = coalesce(s.began_at, excluded.began_at),
       -- When its action ended stays, whatever becomes of its compensation: that is in outbox.saga_event.
       ended_at = case when excluded.state in ('undoing', 'undone', 'stuck') then coalesce(s.ended_at, excluded.ended_at)
                       else excluded.ended_at end
