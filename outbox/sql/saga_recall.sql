-- Purpose: make intents void, unless they are applied already. Their worker finds out when it reads them; for those
--   that are parked there, see saga_hurry.sql.
-- Locks: none beyond an INSERT's. Tables: outbox.saga_void (insert). Called by: outbox.saga.store.save.
insert into outbox.saga_void (id) select unnest(%(ids)s::bigint[]) on conflict do nothing
