-- Purpose: the schedules, for people. `declared`: whether a worker has declared it lately; `overdue`: by how many seconds
--   its next slot has passed, null if it has not.
-- Locks: none. Tables: outbox.cron (read). Called by: outbox.cli.cron.
select name, expression, timezone, missed, target, message ->> 'actor_name' as actor,
       seen_at > outbox.now() - interval '1 minute' as declared, seen_at, next_at,
       case when next_at < outbox.now() then extract(epoch from outbox.now() - next_at)::float8 end as overdue,
       last_slot, last_at, last_id, last_message
  from outbox.cron order by name
