-- Purpose: what a replay would do with each of the intents that it is about, counted. A repetition is not counted beside
--   the intent that it repeats. Reads all of the target's rows once; the sort is the server's.
-- Locks: none. Tables: outbox.word, outbox.receipt (read). Called by: outbox.replay.plan.
with known as (
  select w.id, w.action, w.rank, w.parked, w.void,
         (w.based or w.id = w.rank or w.headers #>> '{replay,anew}' = 'true')
         and /* chosen */ as chosen,
         max(w.rank) filter (where w.action in ('put', 'delete') and w.parked is null and not w.void) over k as last,
         max(w.rank) filter (where w.action in ('put', 'delete') and not w.void
                                   and w.parked is distinct from 'skipped') over k as newest,
         count(*) filter (where w.action in ('put', 'delete') and w.parked is null and not w.void) over r as said,
         max(w.id) filter (where w.parked in ('retry', 'poison', 'in_doubt', 'blocked')) over k as held
    from outbox.word w
   where w.target = %(target)s
     and (%(key)s::text is null or w.key = %(key)s)
     and (%(key_prefix)s::text is null or starts_with(w.key, %(key_prefix)s))
  window k as (partition by w.key), r as (partition by w.key, w.rank)
)
select case when k.void then 'recalled'
            when k.parked = any(%(reasons)s)
              then case when k.action not in ('put', 'delete') then 'once'
                        when k.rank < k.newest or k.said > 0 then 'superseded' else 'anew' end
            when %(reasons)s::text[] is not null then 'applied'
            when k.parked is not null then k.parked
            when k.action not in ('put', 'delete')
              then case when %(target)s <> 'mail' then 'event' when k.action <> 'send' then 'held'
                        when exists (select from outbox.receipt r where r.id = k.id and r.state = 'closed') then 'mail'
                        else 'unsent' end
            when k.rank < k.last then 'superseded'
            when k.held > k.rank then 'behind'
            else 'again' end as fate,
       k.action, count(*)
  from known k
 where k.chosen
 group by 1, 2
