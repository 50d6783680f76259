-- Purpose: go on taking part in queues, whatever else this process does. Locks: rows of outbox.consumer. Tables:
--   outbox.consumer (update). Called by: workers.actor.keeper.
update outbox.consumer set lease_until = outbox.now() + make_interval(secs => %(ttl)s) where owner = %(owner)s
