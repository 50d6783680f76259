-- Purpose: whether anything has committed that a tick doesn't show yet.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.log.beyond.
select exists (select from outbox.log where id > %(floor)s and not pg_visible_in_snapshot(xid, %(snapshot)s))
    or exists (select from outbox.log where xid = any(%(stragglers)s::xid8[]) and id >= %(first)s)
