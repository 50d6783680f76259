-- Purpose: the keys of a lane that later intents must queue behind.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.keys.
select distinct key from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and reason not in ('due', 'skipped')
