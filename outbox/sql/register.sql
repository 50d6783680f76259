-- Purpose: make a participant known, or change how many lanes it has while nothing of it was applied. False if there
--   was nothing to do.
-- Locks: the participant's row and its lanes' rows. Tables: all but outbox.tick (read), outbox.participant,
--   outbox.lane, outbox.position (changed, by the function outbox.register). Called by: outbox.cli.register.
select outbox.register(%(target)s, %(lanes)s::int) as changed
