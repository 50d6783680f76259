-- Purpose: the receipt of an intent. Locks: none. Tables: outbox.receipt (read). Called by: outbox.whereabouts.find.
select state, attempts, epoch, evidence, opened_at, closed_at from outbox.receipt where id = %(id)s
