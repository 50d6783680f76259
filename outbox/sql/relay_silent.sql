-- Purpose: park steps of sagas that were handed on so long ago, and were not heard of: an operator decides. Nobody waits
--   for those any more that were given up meanwhile.
-- Locks: none beyond an INSERT's. Tables: outbox.parked (insert), outbox.relayed, outbox.log, outbox.saga_void (read).
-- Called by: workers.actor.relay.book.
insert into outbox.parked (id, target, slot, key, reason, attempts, error)
select l.id, l.target, l.slot, l.key, 'in_doubt', 1, 'it was relayed, and the far side has not told what became of it'
  from outbox.relayed r join outbox.log l on l.id = r.id
 where r.verdict is null and r.relayed_at < outbox.now() - make_interval(secs => %(silence)s)
   and not exists (select from outbox.saga_void v where v.id = r.id and v.answered)
on conflict (id) do nothing
returning id
