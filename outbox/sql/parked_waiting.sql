-- Purpose: whether anything of a lane is parked for another try, or is due by now.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.waiting.
select id from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s
   and (reason = 'retry' or reason = 'due' and (attempts > 0 or retry_at <= outbox.now()))
 limit 1
