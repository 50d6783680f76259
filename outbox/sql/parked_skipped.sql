-- Purpose: what operators have skipped of a lane: a participant that reads the log again must leave it out.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.skipped.
select id from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and reason = 'skipped'
