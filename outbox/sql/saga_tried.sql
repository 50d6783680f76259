-- Purpose: which intents may have had an effect, of a participant whose attempts are recorded.
-- Locks: none. Tables: outbox.receipt (read). Called by: outbox.saga.report.tried.
select id from outbox.receipt where id = any(%(ids)s)
