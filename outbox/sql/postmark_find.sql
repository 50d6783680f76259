-- Purpose: what came back of some mails.
-- Locks: none. Tables: outbox.postmark (read). Called by: workers.postmark.Postmarks.find.
select token, part, queue_id from outbox.postmark where token = any(%(tokens)s) order by received_at, queue_id
