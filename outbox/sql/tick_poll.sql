-- Purpose: what the clock looks at to decide whether a tick is due. Assigns no xid, so that the sequence
--   is read before the tick's transaction has one. The sequence is read with the function, never from its relation: that
--   is scanned without the buffer's lock, and nextval() has 32 ids too many in it while it writes its WAL record (Postgres,
--   sequence.c). A `low` that is too high becomes the `floor` of a later tick, and readers skip what is drawn below it.
-- Locks: the sequence, as nextval() does. Tables: the sequence outbox.log_id (read). Called by: outbox.tick.poll.
select coalesce(pg_sequence_last_value('outbox.log_id'), 0) as low, pg_current_snapshot()::text as snapshot
