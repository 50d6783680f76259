-- Purpose: the inputs of open sagas of one definition. Locks: none. Tables: outbox.saga (read).
-- Called by: outbox.saga.view.uncontinued.
select input, started_at from outbox.saga
 where name = %(name)s and version = %(version)s and shape = %(shape)s and ended_at is null
