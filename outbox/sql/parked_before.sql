-- Purpose: what is parked of some slots, of the intents up to an id.
-- Locks: none. Tables: outbox.parked (read). Called by: workers.resilver.draft.
select id from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and id <= %(high)s
 order by id
