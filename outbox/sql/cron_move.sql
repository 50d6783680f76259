-- Purpose: move a schedule on, in the transaction that sends its message: whoever does has sent it. Comes back: nothing,
--   if somebody else has, or if another declaration is in force.
-- Locks: the row of outbox.cron, until the transaction ends; waits for another one that is about to send.
-- Tables: outbox.cron (update). Called by: workers.actor.timetable.
update outbox.cron
   set slot = %(upto)s, next_at = %(following)s
 where name = %(name)s and version = %(version)s and slot = %(slot)s
returning name
