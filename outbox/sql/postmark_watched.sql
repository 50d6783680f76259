-- Purpose: since when the receipt's recipient has taken all that was brought to it, when it was last there, and now.
-- Locks: none. Tables: outbox.postmark_watch (read). Called by: workers.postmark.Postmarks.watched.
select w.since, w.seen_at, outbox.now() from (select) as one left join outbox.postmark_watch w on true
