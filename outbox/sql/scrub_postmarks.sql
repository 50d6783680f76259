-- Purpose: all that came back to the receipt's recipient.
-- Locks: none. Tables: outbox.postmark (read). Called by: workers.scrub.trace.
select token, part, queue_id from outbox.postmark
