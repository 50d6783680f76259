-- Purpose: an operator's decision about parked intents, with its audit rows.
-- Locks: rows of outbox.parked, never waited for. Tables: outbox.parked, outbox.receipt, outbox.lane (update),
--   outbox.audit (insert), by the function. Called by: outbox.decision.decide.
select id, target, reason, refused from outbox.decide(%(action)s, %(ids)s, %(note)s, %(client)s) order by id
