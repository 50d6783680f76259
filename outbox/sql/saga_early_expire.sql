-- Purpose: forget what waited too long for a saga that never started.
-- Locks: rows of outbox.saga_early. Tables: outbox.saga_early (delete). Called by: workers.engine.
delete from outbox.saga_early
 where id in (select id from outbox.saga_early where at < outbox.now() - make_interval(secs => %(seconds)s)
               order by at limit %(limit)s)
returning saga, action
