-- Purpose: have the lanes write the next generation, cut anew, and own them.
-- Locks: the participant's row and its lanes' rows, until commit; an owner that writes its position is waited for.
-- Tables: outbox.participant, outbox.lane, outbox.position, outbox.parked (changed), outbox.log, outbox.tick,
--   outbox.saga_void (read), by the function outbox.swap. Called by: workers.resilver.swap.
select lane, epoch, slot_low, slot_high
  from outbox.swap(%(target)s, %(was)s, %(generation)s, %(ticks)s::bigint[], %(again)s::bigint[],
                   %(owner)s, %(place)s, %(ttl)s)
 order by lane
