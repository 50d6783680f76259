-- Purpose: which of these messages an actor has acknowledged in its own transaction. After actor_hold, and not in the
--   same statement: what was waited for there would be too young for its snapshot.
-- Locks: none. Tables: outbox.receipt (read). Called by: workers.actor.ledger.
select r.id from outbox.receipt r where r.id = any(%(ids)s) and r.state = 'closed'
