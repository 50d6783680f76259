-- Purpose: who is at an operation now, and whether it has ended. Locks: none. Tables: outbox.operation (read).
-- Called by: outbox.operation.resume.
select owner, place, state from outbox.operation where id = %(id)s
