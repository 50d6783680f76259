-- Purpose: acknowledge a message in its actor's own transaction. Locks: the lane's row (share), or the message's own.
-- Tables: outbox.receipt, outbox.parked (changed, by the function outbox.actor_done). Called by: outbox.actor.broker.
select outbox.actor_done(%s, %s, %s, %s, %s)
