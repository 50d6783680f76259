-- Purpose: become the owner of an operation that has not ended and that nobody is at: its lease has run out, or its
--   owner is known to be dead (`dead`). Raises the epoch.
-- Locks: the operation's row. Tables: outbox.operation (update). Called by: outbox.operation.resume.
update outbox.operation
   set epoch = epoch + 1, owner = %(owner)s, place = %(place)s,
       lease_until = outbox.now() + make_interval(secs => %(ttl)s)
 where id = %(id)s and state = 'running'
   and (owner is null or lease_until < outbox.now() or owner = %(dead)s::uuid)
returning id, epoch, kind, request, progress
