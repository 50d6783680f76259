-- Purpose: one page of batch(j -> k): what is visible in snapshot k and not in snapshot j, in order of id.
--   The first branch finds stragglers (transactions that ran at tick j) by (xid, id), one at a time, so that
--   one of a million rows is paged too; the second finds everything younger by id. j and k are of one era, and so
--   are the ids: a straggler's from `first` on, because an earlier era's xids are another server's.
-- Why `floor` of j and not its `low`: see docs/explanation/log-and-ticks.md.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.log.page.
(select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text
   from unnest(%(stragglers)s::xid8[]) as s (xid)
  cross join lateral (
         select * from outbox.log
          -- xid = s.xid and id > after, in the words that only the index on (xid, id) can serve in order: with the
          -- plain ones, a partition of few large transactions looks cheaper to read whole.
          where (xid, id) > (s.xid, greatest(%(after)s, %(first)s - 1)) and xid <= s.xid
            and target = %(target)s and slot between %(slot_low)s and %(slot_high)s
          order by xid, id limit %(limit)s) as l
  order by l.id limit %(limit)s)
union all
(select id, target, action, key, payload::text, due, saga, headers::text
   from outbox.log
  where id > greatest(%(after)s, %(floor)s) and id <= %(high)s and xid >= %(xmax)s
    and pg_visible_in_snapshot(xid, %(snapshot)s)
    and target = %(target)s and slot between %(slot_low)s and %(slot_high)s
  order by id limit %(limit)s)
order by id limit %(limit)s
