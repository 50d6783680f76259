-- Purpose: the first intents of batch(j -> k) of several targets, of all slots, in order of id: what lies between two
--   ticks for many lanes at once. As log_page in everything else.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.log.glance.
(select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text, l.slot
   from unnest(%(stragglers)s::xid8[]) as s (xid)
  cross join lateral (
         select * from outbox.log
          where (xid, id) > (s.xid, %(first)s - 1) and xid <= s.xid and target = any(%(targets)s)
          order by xid, id limit %(limit)s) as l
  order by l.id limit %(limit)s)
union all
(select id, target, action, key, payload::text, due, saga, headers::text, slot
   from outbox.log
  where id > %(floor)s and id <= %(high)s and xid >= %(xmax)s
    and pg_visible_in_snapshot(xid, %(snapshot)s) and target = any(%(targets)s)
  order by id limit %(limit)s)
order by id limit %(limit)s
