-- Purpose: the keys of a lane that later intents must queue behind, each with the first intent that holds it.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.heads.
select key, min(id) from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and reason not in ('due', 'skipped')
 group by key
