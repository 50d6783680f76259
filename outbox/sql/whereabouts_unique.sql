-- Purpose: who has the unique key of an actor's message: that one, or another; whether it is pending, and until when the
--   key is taken in any case.
-- Locks: none. Tables: outbox.log, outbox.unique_message, and those of outbox.is_pending (read).
-- Called by: outbox.whereabouts.find.
select u.id, u.id = l.id as own, outbox.is_pending(u.id) as pending, u.until > outbox.now() as taken, u.until
  from outbox.log l
  join outbox.unique_message u on u.target = l.target and u.actor = l.payload ->> 'actor_name'
                              and u.key = l.payload #>> '{options,unique_key}'
 where l.id = %(id)s
