-- Purpose: write down how far an operation got, keep its lease, and have its follower seen, if it has one. No row comes
--   back if the epoch is stale.
-- Locks: the operation's row and its follower's, until commit. Tables: outbox.operation, outbox.follower (update).
-- Called by: outbox.operation.
with saved as (
  update outbox.operation
     set progress = %(progress)s, lease_until = outbox.now() + make_interval(secs => %(ttl)s)
   where id = %(id)s and epoch = %(epoch)s and state = 'running'
  returning id, kind
), seen as (
  update outbox.follower f set seen_at = outbox.now() from saved s where f.name = s.kind || ':' || s.id
)
select id from saved
