-- Purpose: what numbers come to. Locks: none beyond the gate that the caller holds. Tables: outbox.tally (read, by the
--   function outbox.tally_sum). Called by: outbox.actor.limits.
select outbox.tally_sum(%(keys)s)
