-- Purpose: which of these messages an actor has acknowledged in its own transaction. Waits for such transactions that
--   are just ending: they hold the lane's row.
-- Locks: the lanes' rows, until commit. Tables: outbox.lane (lock), outbox.receipt (read).
-- Called by: workers.actor.ledger.
with wait as materialized (
  select l.lane from outbox.lane l
   where (l.target, l.lane) in (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[])) order by l.lane
     for update
)
select r.id from outbox.receipt r where r.id = any(%(ids)s) and r.state = 'closed' and (select count(*) from wait) >= 0
