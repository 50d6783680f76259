-- Purpose: the lanes of queues, and who owns them now. A queue that is relayed has none for workers here.
-- Locks: none. Tables: outbox.lane, outbox.relay (read). Called by: workers.actor.share.
select l.target, l.lane, case when l.lease_until > outbox.now() then l.owner end as owner, l.place
  from outbox.lane l
 where l.target = any(%(targets)s) and not exists (select from outbox.relay r where r.target = l.target)
 order by l.target, l.lane
