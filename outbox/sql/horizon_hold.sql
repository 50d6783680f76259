-- Purpose: keep the horizon where it is until the caller's transaction ends.
-- Locks: the advisory lock outbox.horizon (share), until commit. Tables: none. Called by: outbox.horizon.hold.
select pg_advisory_xact_lock_shared(hashtextextended('outbox.horizon', 0))
