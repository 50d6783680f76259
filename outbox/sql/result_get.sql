-- Purpose: the result of a message. Locks: none. Tables: outbox.result (read). Called by: outbox.actor.results.
select value from outbox.result where key = %(key)s and expires_at > outbox.now()
