-- Purpose: give parked intents of sagas that were recalled their turn at once: they won't be tried, but answered.
-- Locks: rows of outbox.parked. Tables: outbox.parked (update), outbox.saga_void (read).
-- Called by: outbox.saga.report.hurry, in the transaction that holds the lane (outbox.lane.fence).
update outbox.parked p set retry_at = outbox.now()
 where p.target = %(target)s and p.slot between %(slot_low)s and %(slot_high)s
   and p.reason = 'retry' and p.retry_at > outbox.now()
   and exists (select from outbox.saga_void v where v.id = p.id)
