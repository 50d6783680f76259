-- Purpose: what happened to one saga beyond the plain way, in order.
-- Locks: none. Tables: outbox.saga_event (read). Called by: outbox.saga.view.show.
select at, step, what, detail, who from outbox.saga_event where saga = %(id)s order by id
