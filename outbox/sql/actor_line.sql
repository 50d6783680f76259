-- Purpose: whether somebody of these keys of a queue is before a message that was just read: in order (`held`), or waiting
--   as well (`waits`); and how many are in somebody's hands, with rows of their own.
-- Locks: none. Tables: outbox.parked, outbox.log (read). Called by: workers.actor.line.
select k.key,
       exists (select from outbox.parked p
                where p.target = %(target)s and p.key = k.key and p.reason not in ('due', 'skipped')
                  and not outbox.aside(p)) as held,
       exists (select from outbox.parked p
                where p.target = %(target)s and p.key = k.key and p.reason = 'blocked') as waits,
       (select count(*) from outbox.parked p
         where p.target = %(target)s and p.key = k.key and p.reason = 'running') as running
  from unnest(%(keys)s::text[]) as k (key)
