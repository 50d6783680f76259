-- Purpose: remove a schedule that nobody declares any more. Locks: its row. Tables: outbox.cron (delete).
-- Called by: outbox.cli.cron.
delete from outbox.cron where name = %(name)s and seen_at < outbox.now() - interval '1 minute' returning name
