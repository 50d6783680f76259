-- Purpose: whether a tick that isn't there lies in what the log lost, and not among those that were thinned: it is
--   between the last tick that was there when an era was opened, and the beginning of that era.
-- Locks: none. Tables: outbox.era, outbox.tick (read). Called by: outbox.tick.match.
select from outbox.era e
 where e.number > 1 and e.opened - 1 = (select min(id) from outbox.tick where id >= %(tick)s)
