-- Purpose: note the message that a schedule has sent, in the same transaction.
-- Locks: the row of outbox.cron. Tables: outbox.cron (update). Called by: workers.actor.timetable.
update outbox.cron
   set last_id = %(id)s, last_message = %(message_id)s, last_slot = %(slot)s, last_at = outbox.now()
 where name = %(name)s
