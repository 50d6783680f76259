-- Purpose: store the postmarks of one message; twice is once.
-- Locks: none. Tables: outbox.postmark (insert), by a function that may. Called by: workers.postmark.Postmarks.put.
select outbox.put_postmarks(%(tokens)s::text[], %(parts)s::text[], %(queue_id)s)
