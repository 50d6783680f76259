-- Purpose: the lanes of queues, and whether somebody owns them. Locks: none. Tables: outbox.lane (read).
-- Called by: workers.actor.share.
select target, lane, owner is not null and lease_until > outbox.now() as owned, place
  from outbox.lane where target = any(%(targets)s) order by target, lane
