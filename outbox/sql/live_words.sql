-- Purpose: the last word about some keys at a tick: a put, or a delete; none for a key that was never put. What is set
--   aside doesn't count. Reads all of the target's rows: nothing else is found by its key.
-- Locks: none. Tables: outbox.horizon, outbox.word (read). Called by: outbox.live.words.
select distinct on (key collate "C")
       id, target, action, key, payload::text as body, null::timestamptz as due, null::uuid as saga,
       headers::text as headers
  from outbox.word
 where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and key = any(%(keys)s)
   and action in ('put', 'delete') and parked is null and not void
   and (based and id < (select h.id from outbox.horizon h)
        or not based and id <= %(high)s and pg_visible_in_snapshot(xid, %(snapshot)s))
 order by key collate "C", rank desc, id desc
