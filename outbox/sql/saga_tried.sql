-- Purpose: which intents may have had an effect, of a participant whose attempts are recorded.
-- Locks: none. Tables: outbox.receipt (read). Called by: outbox.saga.report.tried.
select r.id from outbox.receipt r where r.id = any(%(ids)s) and outbox.saga_traced(r)
