-- Purpose: give every intent its turn that is blocked behind nothing any more: an operator has
--   taken its key's head out.
-- Locks: rows of outbox.parked. Tables: outbox.parked (update). Called by: outbox.parked.promote, in the
--   transaction that holds the lane (outbox.lane.fence).
update outbox.parked p set reason = 'retry', retry_at = outbox.now()
 where p.target = %(target)s and p.slot between %(slot_low)s and %(slot_high)s and p.reason = 'blocked'
   and not exists (select from outbox.parked h
                    where h.target = p.target and h.key = p.key and h.id < p.id
                      and h.reason not in ('due', 'skipped'))
