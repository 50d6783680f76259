-- Purpose: those of our schedules that are in force and whose next slot has come.
-- Locks: none. Tables: outbox.cron, outbox.identity (read). Called by: workers.actor.timetable.
select c.name, c.slot, outbox.now() as now, i.log
  from outbox.cron c
  join unnest(%(names)s::text[], %(versions)s::text[]) as m (name, version) using (name, version)
 cross join outbox.identity i
 where c.next_at <= outbox.now() order by c.next_at, c.name
