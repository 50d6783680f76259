-- Purpose: take part in queues no more. Locks: rows of outbox.consumer. Tables: outbox.consumer (delete).
-- Called by: workers.actor.share.
delete from outbox.consumer where owner = %(owner)s and target = any(%(targets)s)
