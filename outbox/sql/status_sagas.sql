-- Purpose: how many sagas have not ended, by state. Locks: none. Tables: outbox.saga (read). Called by: outbox.status.
select state, count(*) as count, extract(epoch from outbox.now() - min(started_at))::float8 as oldest_seconds
  from outbox.saga where ended_at is null group by state order by state
