-- Purpose: whether a number is there. Locks: none. Tables: outbox.tally (read). Called by: outbox.actor.limits.
select value from outbox.tally where key = %(key)s and expires_at > outbox.now()
