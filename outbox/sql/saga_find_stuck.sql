-- Purpose: stuck steps of open sagas that fit a filter, in the order in which their sagas were started.
-- Locks: none. Tables: outbox.saga, outbox.saga_step (read). Called by: outbox.saga.view.stuck.
select s.id, t.step
  from outbox.saga s join outbox.saga_step t on t.saga = s.id
 where s.ended_at is null and t.state = 'stuck'
   and (%(id)s::uuid is null or s.id = %(id)s)
   and (%(name)s::text is null or s.name = %(name)s)
   and (%(key)s::text is null or s.key = %(key)s)
   and (%(older)s::float8 is null or s.started_at < outbox.now() - make_interval(secs => %(older)s))
   and (%(step)s::text is null or t.step = %(step)s)
 order by s.started_at, s.id, t.place limit %(limit)s
