-- Purpose: which keys base or log has ever said anything about. Reads all of the target's rows once.
-- Locks: none. Tables: outbox.word, that is outbox.base and outbox.log (read). Called by: workers.scrub.repair.
select distinct key from outbox.word where target = %(target)s and key = any (%(keys)s)
