-- Purpose: park what the owner of a lane before left open, to be tried at once. `deaths`: 1 if that owner died, because
--   each of them may have killed it.
-- Locks: rows of outbox.parked. Tables: outbox.parked (insert), outbox.log (read).
-- Called by: workers.actor.holding, in the transaction that holds the lane (outbox.lane.fence).
insert into outbox.parked (id, target, slot, key, reason, deaths, retry_at, error)
select l.id, l.target, l.slot, l.key, 'retry', %(deaths)s, outbox.now(),
       case when %(deaths)s > 0 then 'its worker died while it was in hand' else '' end
  from outbox.log l where l.id = any(%(ids)s)
on conflict (id) do nothing
