-- Purpose: make a definition's steps known to people.
-- Locks: none beyond an INSERT's. Tables: outbox.saga_plan (insert). Called by: outbox.saga.store.publish.
insert into outbox.saga_plan (name, version, shape, nodes) values (%(name)s, %(version)s, %(shape)s, %(nodes)s::jsonb)
on conflict do nothing
