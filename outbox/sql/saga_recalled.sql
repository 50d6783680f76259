-- Purpose: which intents the engine has recalled and has no answer about.
-- Locks: none. Tables: outbox.log, outbox.saga_step (read). Called by: outbox.saga.report.recalled.
select l.id from outbox.log l join outbox.saga_step t on t.saga = l.saga and t.intent = l.id
 where l.id = any(%(ids)s) and t.state = 'recalled'
