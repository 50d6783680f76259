-- Purpose: whether the stored ticks were taken by this server. A snapshot means something only where its
--   transactions ran: after a dump and restore, all ticks come from one transaction, or from a future of this server.
--   Each tick is a transaction of its own, so two of them never share their xmin.
-- Locks: none. Tables: outbox.tick (read). Called by: outbox.tick.check_history.
select count(distinct t.xmin::text) = count(*) as one_each,
       coalesce(bool_and(pg_snapshot_xmax(t.snapshot)::text::numeric
                         <= pg_snapshot_xmax(pg_current_snapshot())::text::numeric), true) as past
  from (select xmin, snapshot from outbox.tick order by id desc limit 3) as t
