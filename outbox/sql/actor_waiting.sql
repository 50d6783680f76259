-- Purpose: keys of which messages wait for their turn, in order, from a key on, of some lanes of a queue: a look at a
--   part of them, however many messages there are. A null key: there are no more.
-- Locks: none. Tables: outbox.parked (read). Called by: workers.actor.line.
with recursive seen as (
  select 0 as n, %(after)s::text as key, null::smallint as slot
  union all
  select s.n + 1, next.key, next.slot
    from seen s left join lateral (
           select p.key, p.slot from outbox.parked p
            where p.target = %(target)s and p.reason = 'blocked' and p.key > s.key order by p.key limit 1) as next on true
   where s.key is not null and s.n < %(limit)s
)
select s.key,
       s.key is null or exists (select from unnest(%(low)s::smallint[], %(high)s::smallint[]) as l (low, high)
                                 where s.slot between l.low and l.high) as ours
  from seen s where s.n > 0 order by s.n
