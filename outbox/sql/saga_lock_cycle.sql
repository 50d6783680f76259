-- Purpose: whether a saga would wait for itself. A saga waits for those before it in its locks' queues, and for its open
--   children: so it does if it waits, near or far, for its own parent.
-- Locks: none; the caller holds the advisory lock. Tables: outbox.saga_lock, outbox.saga (read).
-- Called by: outbox.saga.locks.take.
with recursive waits (saga) as (
  select %(saga)s::uuid
  union
  select n.saga from waits w cross join lateral (
    select b.saga from outbox.saga_lock m join outbox.saga_lock b on b.name = m.name and b.since < m.since
     where m.saga = w.saga and not m.held
    union all
    select c.id from outbox.saga c where c.parent = w.saga and c.ended_at is null
  ) as n (saga)
)
select exists (select from waits w join outbox.saga me on me.id = %(saga)s and me.parent = w.saga)
