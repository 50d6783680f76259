-- Purpose: remove what was kept of messages that are done. Locks: rows of outbox.receipt. Tables: outbox.receipt
--   (delete). Called by: workers.actor.ledger, in the transaction that records that they are done.
delete from outbox.receipt where id = any(%(ids)s)
