-- Purpose: who needs what lies below an id. Locks: none. Tables: all (read, by outbox.held).
-- Called by: outbox.retention.plan.
select kind, name, count, since, extract(epoch from outbox.now() - since)::float8 as seconds
  from outbox.held(%(until)s, %(cut)s)
