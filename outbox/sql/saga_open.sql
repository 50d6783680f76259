-- Purpose: open sagas by definition and steps. Locks: none. Tables: outbox.saga (read). Called by: outbox.saga.view.open_.
select name, version, shape, count(*) as sagas, min(started_at) as oldest
  from outbox.saga where ended_at is null group by name, version, shape order by name, version, shape
