-- Purpose: what each key's content is at a tick: the last put of every key that was not deleted since, from base and
--   log together, in order of key. Left out is what was never applied: parked or skipped, and recalled by a saga. A
--   repetition counts where the repeated intent stands (its rank), and is what the participant has it from.
--   Reads all of the target's rows once; the sort is the server's.
-- Locks: none. Tables: outbox.horizon, and outbox.word, that is outbox.base, outbox.log, outbox.parked,
--   outbox.saga_void (read). Called by: outbox.live.puts.
select id, target, action, key, body, null::timestamptz as due, null::uuid as saga, headers
  from (
  select distinct on (key collate "C")
         id, target, action, key, payload::text as body, headers::text as headers
    from outbox.word
   where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and key > %(after)s collate "C"
     and (%(keys)s::text[] is null or key = any (%(keys)s))
     and action in ('put', 'delete') and parked is null and not void
     and (based and id < (select h.id from outbox.horizon h)
          or not based and outbox.shows(%(first)s, %(high)s, %(snapshot)s, xid, id))
   order by key collate "C", rank desc, id desc
  ) as last
 where action = 'put'
 order by key collate "C"
