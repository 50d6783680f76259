-- Purpose: queue for locks, all of them at once.
-- Locks: none beyond an INSERT's; the caller holds the advisory lock. Tables: outbox.saga_lock (insert).
-- Called by: outbox.saga.locks.take.
insert into outbox.saga_lock (name, saga, held)
select name, %(saga)s, false from unnest(%(names)s::text[]) as name
