-- Purpose: append one intent in the application's transaction: what most transactions have, without arrays.
-- Locks: none beyond an INSERT's. Tables: outbox.log (insert). Called by: outbox.session.
insert into outbox.log (target, action, key, payload, due, saga, headers)
values (%s, %s, %s, %s::jsonb, %s, %s, %s::jsonb)
returning xid::text::bigint, id
