-- Purpose: write down how far an operation got, and keep its lease. No row comes back if the epoch is stale.
-- Locks: the operation's row, until commit. Tables: outbox.operation (update). Called by: outbox.operation.
update outbox.operation
   set progress = %(progress)s, lease_until = outbox.now() + make_interval(secs => %(ttl)s)
 where id = %(id)s and epoch = %(epoch)s and state = 'running'
returning id
