-- Purpose: where an intent went that is not in the log any more.
-- Locks: none. Tables: outbox.archive (read). Called by: outbox.whereabouts.find.
select place, name, dropped_at from outbox.archive where first <= %(id)s and until > %(id)s
