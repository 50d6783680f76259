-- Purpose: forget the timeouts of steps that are no longer running.
-- Locks: rows of outbox.saga_timer. Tables: outbox.saga_timer (delete). Called by: outbox.saga.store.save.
delete from outbox.saga_timer t
 using unnest(%(saga)s::uuid[], %(step)s::text[]) as n (saga, step)
 where t.saga = n.saga and t.step = n.step and t.what = 'timeout'
