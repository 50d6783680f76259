-- Purpose: sagas that fit a filter, the newest first.
-- Locks: none. Tables: outbox.saga, outbox.saga_step (read). Called by: outbox.saga.view.find.
select s.id, s.name, s.version, s.key, s.state, s.reason, s.parent, s.started_at, s.ended_at,
       extract(epoch from coalesce(s.ended_at, outbox.now()) - s.started_at)::float8 as seconds,
       array(select t.step from outbox.saga_step t
              where t.saga = s.id and t.state in ('running', 'recalled', 'undoing', 'stuck') order by t.place) as steps
  from outbox.saga s
 where (%(name)s::text is null or s.name = %(name)s)
   and (%(key)s::text is null or s.key = %(key)s)
   and (%(states)s::text[] is null or s.state = any(%(states)s))
   and (not %(open)s or s.ended_at is null)
   and (%(older)s::float8 is null or s.started_at < outbox.now() - make_interval(secs => %(older)s))
 order by s.started_at desc limit %(limit)s
