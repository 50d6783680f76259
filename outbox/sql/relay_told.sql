-- Purpose: record what the far side says became of messages. Said again, nothing happens.
-- Locks: rows of outbox.relayed and outbox.parked. Tables: by outbox.relay_told outbox.relayed (update), outbox.parked
--   (insert, delete), the log and saga_void (insert).
-- Called by: workers.actor.relay.book, outbox.actor.outcomes.
select outbox.relay_told(%(ids)s::bigint[], %(messages)s::text[], %(verdicts)s::text[], %(errors)s::text[])
