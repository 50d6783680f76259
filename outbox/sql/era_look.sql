-- Purpose: the newest era, and whether this is the server that it is written in. A snapshot means something only where
--   its transactions ran: after a dump and restore, all ticks come from one transaction, or from a future of this
--   server. Each tick is a transaction of its own, so two of them never share their xmin.
-- Locks: none. Tables: outbox.era, outbox.tick (read). Called by: outbox.era.look.
select e.number, e.opened, e.first, e.at, e.halted,
       e.server = h.server as server,
       e.relation = h.relation as relation,
       e.database = h.database as database,
       e.timeline = h.timeline as timeline,
       t.one_each and t.past as ticks
  from (select * from outbox.era order by number desc limit 1) as e
 cross join outbox.here() as h
 cross join lateral (
   select count(distinct k.xmin::text) = count(*) as one_each,
          coalesce(bool_and(pg_snapshot_xmax(k.snapshot)::text::numeric
                            <= pg_snapshot_xmax(pg_current_snapshot())::text::numeric), true) as past
     from (select xmin, snapshot from outbox.tick where id >= e.opened order by id desc limit 3) as k
 ) as t
