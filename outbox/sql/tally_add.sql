-- Purpose: set a number that isn't there. Locks: its row, its gate (shared). Tables: outbox.tally (insert, update, by the
--   function outbox.tally_add). Called by: outbox.actor.limits.
select outbox.tally_add(%(key)s, %(value)s, %(ttl)s)
