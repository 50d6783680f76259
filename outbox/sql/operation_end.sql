-- Purpose: end an operation, or leave it for somebody to resume (state `running` with no owner). One that has ended holds
--   the log back no longer (`outbox.operation.Operation.hold`). No row comes back if the epoch is stale.
-- Locks: the operation's row and its follower's, until commit. Tables: outbox.operation (update), outbox.follower
--   (delete). Called by: outbox.operation.
with ended as (
  update outbox.operation
     set state = %(state)s, error = %(error)s, result = %(result)s, owner = null, place = null, lease_until = null,
         ended_at = case when %(state)s <> 'running' then outbox.now() end
   where id = %(id)s and epoch = %(epoch)s and state = 'running'
  returning id, kind
), released as (
  delete from outbox.follower f using ended e where f.name = e.kind || ':' || e.id and %(state)s <> 'running'
)
select id from ended
