-- Purpose: what each key's content is at a tick: the last put of every key that was not deleted since, from base and
--   log together, in order of key. Left out is what was never applied: parked or skipped, and recalled by a saga.
--   Reads all of the target's rows once; the sort is the server's.
-- Locks: none. Tables: outbox.base, outbox.log, outbox.parked, outbox.saga_void (read). Called by: outbox.live.puts.
select id, target, 'put' as action, key, body, null::timestamptz as due, null::uuid as saga, headers
  from (
  select distinct on (key collate "C") *
    from (
      select id, target, 'put' as action, key, payload::text as body, headers::text as headers
        from outbox.base
       where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and key > %(after)s collate "C"
      union all
      select l.id, l.target, l.action, l.key, l.payload::text, l.headers::text
        from outbox.log l
       where l.target = %(target)s and l.slot between %(slot_low)s and %(slot_high)s
         and l.key > %(after)s collate "C" and l.action in ('put', 'delete')
         and outbox.shows(%(first)s, %(high)s, %(snapshot)s, l.xid, l.id)
         and not exists (select from outbox.parked p where p.id = l.id)
         and not exists (select from outbox.saga_void v where v.id = l.id)
    ) as known
   order by key collate "C", id desc
  ) as last
 where action = 'put'
 order by key collate "C"
