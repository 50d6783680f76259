-- Purpose: the parked intent that the others of its key wait for.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.whereabouts.find.
select id, reason from outbox.parked
 where target = %(target)s and key = %(key)s and id < %(id)s and reason not in ('due', 'skipped')
 order by id limit 1
