-- Purpose: begin an operation; its owner holds it by a lease.
-- Locks: none beyond an INSERT's. Tables: outbox.operation (insert). Called by: outbox.operation.begin.
insert into outbox.operation (kind, request, progress, client, owner, place, lease_until)
values (%(kind)s, %(request)s, %(progress)s, %(client)s, %(owner)s, %(place)s,
        outbox.now() + make_interval(secs => %(ttl)s))
returning id, epoch, kind, request, progress
