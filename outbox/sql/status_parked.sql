-- Purpose: how many intents are parked, by participant and reason; not those that operators have skipped.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.status.read.
select target, reason, count(*), extract(epoch from outbox.now() - min(parked_at))::float8 as oldest_seconds
  from outbox.parked where reason <> 'skipped' group by target, reason order by target, reason
