-- Purpose: what the clock looks at to decide whether a tick is due. Assigns no xid, so that the sequence
--   is read before the tick's transaction has one.
-- Locks: none. Tables: the sequence outbox.log_id (read). Called by: outbox.tick.poll.
select case when is_called then last_value else last_value - 1 end as low,
       pg_current_snapshot()::text as snapshot
  from outbox.log_id
