-- Purpose: which keys nobody can tell about at a tick: something of them is parked (its effect may be there or not),
--   or has committed since. Reads the log from the tick on, and by the xid index what ran at the tick.
-- Locks: none. Tables: outbox.parked, outbox.log (read). Called by: workers.scrub.comparison.
select key from outbox.parked
 where target = %(target)s and key = any (%(keys)s) and reason <> 'skipped'
union
select key from outbox.log
 where id > %(floor)s and not outbox.shows(%(first)s, %(high)s, %(snapshot)s, xid, id)
   and target = %(target)s and key = any (%(keys)s)
union
select key from outbox.log
 where xid = any (%(stragglers)s::xid8[]) and id >= %(first)s
   and target = %(target)s and key = any (%(keys)s)
