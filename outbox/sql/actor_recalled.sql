-- Purpose: give messages their turn that wait for it, were never tried, and were recalled by their saga: they are not run,
--   and it waits for that answer.
-- Locks: rows of outbox.parked. Tables: outbox.parked (update), outbox.saga_void (read). Called by: workers.actor.line.
update outbox.parked p set reason = 'retry', retry_at = outbox.now()
  from outbox.saga_void v
 where not v.answered and v.id = p.id and p.reason = 'blocked' and p.attempts = 0 and p.target = any(%(targets)s)
