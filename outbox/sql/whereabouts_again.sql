-- Purpose: the repetitions of an intent, the newest first: those that operations appended which had not ended when it was
--   written. Reads the log from there on, unless there was no such operation.
-- Locks: none. Tables: outbox.log, outbox.operation (read). Called by: outbox.whereabouts.find.
select r.id, r.created_at,
       case when r.headers #>> '{replay,operation}' ~ '^[0-9]{1,18}$'
            then (r.headers #>> '{replay,operation}')::bigint end as operation
  from outbox.log r
 where r.id > %(id)s and r.target = %(target)s and r.slot = %(slot)s and r.key = %(key)s
   and outbox.repeats(r.headers) = %(id)s
   and exists (select from outbox.operation o
                where o.kind in ('replay', 'scrub', 'resilver') and (o.ended_at is null or o.ended_at >= %(created_at)s))
 order by r.id desc limit %(limit)s
