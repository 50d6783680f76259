-- Purpose: recalled intents that are parked behind another one of their key: never tried, so they needn't wait for it.
-- Locks: none. Tables: outbox.parked, outbox.saga_void (read).
-- Called by: outbox.saga.report.blocked, in the transaction that holds the lane (outbox.lane.fence).
select p.id from outbox.parked p join outbox.saga_void v on v.id = p.id
 where p.target = %(target)s and p.slot between %(slot_low)s and %(slot_high)s
   and p.reason = 'blocked' and not v.answered
