-- Purpose: tell the engine what became of a lane's intents of sagas, in order. → whether the lane is the caller's.
-- Locks: none beyond an INSERT's. Tables: by outbox.saga_report the log and saga_void (insert), the lane (read).
-- Called by: outbox.saga.report.send, in the transaction that holds the lane (outbox.lane.fence).
select outbox.saga_report(%(target)s, %(lane)s, %(epoch)s, %(ids)s::bigint[], %(verdicts)s::text[], %(errors)s::text[])
