-- Purpose: tell the engine what became of intents of sagas, in order.
-- Locks: none beyond an INSERT's. Tables: by outbox.saga_report the log and saga_void (insert).
-- Called by: outbox.saga.report.send, in the transaction that holds the lane (outbox.lane.fence).
select outbox.saga_report(%(ids)s::bigint[], %(verdicts)s::text[], %(errors)s::text[])
