-- Purpose: the last complete scrub of each participant.
-- Locks: none. Tables: outbox.operation (read). Called by: outbox.status, workers.scrub.schedule.
select distinct on (request ->> 'target') request ->> 'target' as target, id as operation,
       (result ->> 'found')::int as found, (result ->> 'mended')::int as mended,
       coalesce((result ->> 'moving')::int, 0) as moving,
       (request ->> 'every')::float8 as every, extract(epoch from outbox.now() - started_at)::float8 as seconds
  from outbox.operation
 where kind = 'scrub' and state = 'done'
 order by request ->> 'target', id desc
