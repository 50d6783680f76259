-- Purpose: end an operation, or leave it for somebody to resume (state `running` with no owner). No row comes back if
--   the epoch is stale.
-- Locks: the operation's row, until commit. Tables: outbox.operation (update). Called by: outbox.operation.
update outbox.operation
   set state = %(state)s, error = %(error)s, result = %(result)s, owner = null, place = null, lease_until = null,
       ended_at = case when %(state)s <> 'running' then outbox.now() end
 where id = %(id)s and epoch = %(epoch)s and state = 'running'
returning id
