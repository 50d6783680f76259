-- Purpose: one page of the batch from the first tick, which shows nothing: the base, whose ids are below the horizon, and
--   then the log, in order of id. One statement, so that no drop comes between the two.
-- Locks: none. Tables: outbox.base, outbox.horizon, outbox.log (read). Called by: outbox.log.page.
(select b.id, b.target, 'put', b.key, b.payload::text, null::timestamptz, null::uuid, b.headers::text
   from outbox.base b
  where b.target = %(target)s and b.id > %(after)s and b.id < (select h.id from outbox.horizon h)
    and b.slot between %(slot_low)s and %(slot_high)s
  order by b.id limit %(limit)s)
union all
(select id, target, action, key, payload::text, due, saga, headers::text
   from outbox.log
  where id > %(after)s and outbox.shows(%(first)s, %(high)s, %(snapshot)s, xid, id)
    and target = %(target)s and slot between %(slot_low)s and %(slot_high)s
  order by id limit %(limit)s)
order by id limit %(limit)s
