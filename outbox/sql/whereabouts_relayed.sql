-- Purpose: what is known of a step of a saga that was relayed. Locks: none. Tables: outbox.relayed (read).
-- Called by: outbox.whereabouts.find.
select relayed_at, verdict, heard_at from outbox.relayed where id = %(id)s
