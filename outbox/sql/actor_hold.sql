-- Purpose: hold lanes against actors that acknowledge in their own transactions, and wait for those that are just ending:
--   they hold the lane's row.
-- Locks: the lanes' rows, until commit. Tables: outbox.lane (lock). Called by: workers.actor.ledger.
select from outbox.lane l
 where (l.target, l.lane) in (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[]))
 order by l.target, l.lane for update
