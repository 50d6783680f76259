-- Purpose: delete all but the newest position of each lane.
-- Locks: rows of outbox.position. Tables: outbox.position (delete). Called by: workers.clock.
delete from outbox.position p
 where p.seq < (select max(n.seq) from outbox.position n where n.target = p.target and n.lane = p.lane)
