-- Purpose: send a message with a unique key, unless one of its key is pending. Comes back: the one that was sent (true),
--   or the one that is there (false).
-- Locks: the key's row, until the transaction ends, if it is sent; waits for another sender of the key.
-- Tables: outbox.log (insert), outbox.unique_message (insert, update), outbox.position, outbox.parked (read), by the
--   function. Called by: outbox.actor.unique.
select xid, id, message_id, sent from outbox.send_unique(%s, %s, %s, %s::jsonb, %s::timestamptz, %s::jsonb)
