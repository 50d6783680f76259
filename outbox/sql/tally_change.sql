-- Purpose: count up or down, within bounds. Locks: the number's row, its gate (shared). Tables: outbox.tally (insert,
--   update, by the function outbox.tally_change). Called by: outbox.actor.limits.
select outbox.tally_change(%(key)s, %(delta)s, %(low)s, %(high)s, %(ttl)s, %(party)s)
