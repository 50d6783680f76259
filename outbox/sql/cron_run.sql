-- Purpose: send the message of a schedule now. Comes back: its intent and id, or those of the one that has its unique key.
-- Locks: the row of outbox.cron. Tables: outbox.cron (update), outbox.log (insert), by the function.
-- Called by: outbox.cli.cron.
select id, message_id, sent from outbox.run_cron(%(name)s, %(client)s)
