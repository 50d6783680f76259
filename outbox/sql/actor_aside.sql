-- Purpose: give messages that are running rows of their own, because their lane goes to another consumer.
-- Locks: rows of outbox.parked. Tables: outbox.parked (insert), outbox.log (read).
-- Called by: workers.actor.ledger, in the transaction that holds the lane.
insert into outbox.parked (id, target, slot, key, reason, holder, attempts, deaths)
select l.id, l.target, l.slot, l.key, 'running', %(holder)s, 1, 1 from outbox.log l where l.id = any(%(ids)s)
on conflict (id) do nothing
