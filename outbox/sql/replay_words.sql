-- Purpose: the last word about each key of a participant that a replay is about, in order of key: its put or delete of
--   the highest rank that was applied. With it, the first intent of the key after it that is parked, and whether that
--   one holds the key (then a repetition would only queue up behind it). Of a blob, whether its bytes travel along.
--   Reads all of the target's rows once; the sort is the server's.
-- Locks: none. Tables: outbox.word, outbox.parked (read). Called by: outbox.repetition.words.
select w.id, w.rank, w.key, w.action, p.first, coalesce(p.holds, false) as held, w.stage, w.inline
  from (
  select distinct on (w.key collate "C") w.id, w.key, w.action, w.rank, w.headers, w.saga, w.xid, w.created_at, w.based,
         case when w.target = 'blob' then w.payload ->> 'stage' end as stage,
         w.target = 'blob' and w.payload ? 'bytes' as inline
    from outbox.word w
   where w.target = %(target)s and w.key > %(after)s collate "C" and w.action in ('put', 'delete')
     and w.parked is null and not w.void
     and (%(key)s::text is null or w.key = %(key)s)
     and (%(key_prefix)s::text is null or starts_with(w.key, %(key_prefix)s))
     and (%(keys)s::text[] is null or w.key = any(%(keys)s))
   order by w.key collate "C", w.rank desc, w.id
  ) as w
  left join lateral (
  select min(p.id) as first, bool_or(p.reason <> 'due') as holds
    from outbox.parked p
   where p.target = %(target)s and p.key = w.key and p.id > w.rank and p.reason <> 'skipped') as p on true
 where /* chosen */
 order by w.key collate "C"
