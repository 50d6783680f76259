-- Purpose: give locks back, held or waited for. → who waits for any of them.
-- Locks: rows of outbox.saga_lock; the caller holds the advisory lock. Tables: outbox.saga_lock (delete).
-- Called by: outbox.saga.locks.
with gone as (
  delete from outbox.saga_lock where saga = any(%(ids)s) returning name
)
select l.saga from outbox.saga_lock l join gone on gone.name = l.name
 where l.saga <> all(%(ids)s) and not l.held order by l.since
