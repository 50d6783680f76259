-- Purpose: turn timers that are due into intents for the engine, and forget them, in one transaction.
-- Locks: the timers; the lane row (share), until commit. Tables: outbox.saga_timer (delete), outbox.log (insert),
--   outbox.lane (lock). Called by: workers.engine.
with fence as (
  select slot_low, slot_high from outbox.lane
   where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
), ready as (
  select t.saga, t.step, t.what from outbox.saga_timer t, fence
   where t.due <= outbox.now() and t.slot between fence.slot_low and fence.slot_high
   order by t.due limit %(limit)s for update of t
), rung as (
  delete from outbox.saga_timer t using ready r
   where t.saga = r.saga and t.step = r.step and t.what = r.what
  returning t.saga, t.step, t.what, t.round, t.tries
)
insert into outbox.log (target, action, key, payload)
select 'saga', 'timer', saga::text,
       jsonb_build_object('step', step, 'what', what, 'round', round, 'tries', tries)
  from rung
returning id
