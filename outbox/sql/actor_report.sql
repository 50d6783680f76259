-- Purpose: tell the engine what became of messages of sagas, in order.
-- Locks: none beyond an INSERT's. Tables: by outbox.actor_report the log and saga_void (insert).
-- Called by: outbox.saga.report.send_of_actors, in the transaction that records the same.
select outbox.actor_report(%(ids)s::bigint[], %(verdicts)s::text[], %(errors)s::text[])
