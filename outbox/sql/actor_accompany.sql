-- Purpose: note that a message isn't the only one in hand any more, before another one is taken: if its worker dies now,
--   it is not known to have been the cause.
-- Locks: its row. Tables: outbox.parked (update). Called by: workers.actor.retries.
update outbox.parked set alone = false where id = %(id)s and reason = 'running' and holder = %(holder)s
