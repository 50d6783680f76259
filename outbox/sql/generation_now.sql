-- Purpose: how many lanes a participant has, and which generation of its data they write.
-- Locks: none. Tables: outbox.participant (read). Called by: workers.resilver.
select lanes, generation from outbox.participant where target = %(target)s
