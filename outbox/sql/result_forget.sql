-- Purpose: take the result of a message away. Locks: its row. Tables: outbox.result (delete).
-- Called by: outbox.actor.results.
delete from outbox.result where key = %(key)s and expires_at > outbox.now() returning value
