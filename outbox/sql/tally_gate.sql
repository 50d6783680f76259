-- Purpose: keep everybody else from counting what is summed up. Locks: the gates of these keys, until commit. Tables: none.
-- Called by: outbox.actor.limits.
select outbox.tally_gate(%(keys)s, true)
