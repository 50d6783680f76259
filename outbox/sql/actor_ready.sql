-- Purpose: whether a retry or a delayed message of these queues is due, and how often such ones were in hand when their
--   worker died, without locking or writing anything.
-- Locks: none. Tables: outbox.parked (read). Called by: workers.actor.retries.
select target, min(deaths) as least, max(deaths) as most
  from (select target, deaths from outbox.parked
         where target = any(%(targets)s) and retry_at <= outbox.now() and reason in ('retry', 'due')
         order by target, retry_at limit 1000) as ready group by target
