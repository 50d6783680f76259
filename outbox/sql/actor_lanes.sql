-- Purpose: the lanes of queues, and who owns them now. Locks: none. Tables: outbox.lane (read).
-- Called by: workers.actor.share.
select target, lane, case when lease_until > outbox.now() then owner end as owner, place
  from outbox.lane where target = any(%(targets)s) order by target, lane
