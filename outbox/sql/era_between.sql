-- Purpose: the era that began when a tick was not in the log any more: the tick lies between the last one that had been
--   kept (or restored) and the era's beginning, and so in the time that was lost.
-- Locks: none. Tables: outbox.era, outbox.tick (read). Called by: outbox.tick.match.
select e.number, e.at
  from outbox.era e
 where e.opened - 1 = (select min(id) from outbox.tick where id >= %(tick)s)
   and e.number > 1
