-- Purpose: whether any parked intent is to be tried without an operator or a later day.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.waiting.
select from outbox.parked
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s
   and (reason = 'retry' or reason = 'due' and (attempts > 0 or retry_at <= outbox.now()))
 limit 1
