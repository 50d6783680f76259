-- Purpose: forget attempts that are known to have had no effect.
-- Locks: rows of outbox.receipt. Tables: outbox.receipt (delete).
-- Called by: outbox.receipt.record, in the transaction that holds the lane (outbox.lane.fence).
delete from outbox.receipt where id = any(%(ids)s) and state = 'open' and evidence = '{}'
