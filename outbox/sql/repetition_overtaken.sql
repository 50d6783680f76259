-- Purpose: which repetitions something newer of their key comes before, in the order of the lane: a put or delete of a
--   higher rank that was applied, and that the lane has passed (it is in tick `start`) or that stands before the
--   repetition in the batch that ends with tick `end`. What was parked or recalled is not newer: it isn't there.
--   Where the part of the log was dropped that would have to be searched, the base tells: what is live at the horizon
--   is in it. Reads the log from `floor` on, once: `floor` is the smallest `since`.
-- Locks: none. Tables: outbox.log, outbox.base, outbox.horizon, outbox.parked, outbox.saga_void (read).
-- Called by: outbox.repetition.overtaken.
with repetition as materialized (
  select r.* from unnest(%(ids)s::bigint[], %(keys)s::text[], %(ofs)s::bigint[], %(sinces)s::bigint[], %(anews)s::bool[],
                           %(actions)s::text[]) as r (id, key, rank, since, anew, action), outbox.horizon h
   where r.id >= h.id
), newer as materialized (
  select l.id, l.key, outbox.shows(%(start_first)s, %(start_high)s, %(start)s, l.xid, l.id) as passed
    from outbox.log l
   where l.id > %(floor)s and l.target = %(target)s
     and l.slot between %(slot_low)s and %(slot_high)s and l.key = any(%(keys)s) and l.action in ('put', 'delete')
     and outbox.repeats(l.headers) is null and outbox.shows(%(end_first)s, %(end_high)s, %(end)s, l.xid, l.id)
     and not exists (select from outbox.parked p where p.id = l.id)
     and not exists (select from outbox.saga_void v where v.id = l.id)
)
select r.id from repetition r
 where exists (select from newer n
                where n.key = r.key and n.id > r.since and n.id > r.rank and (n.passed or n.id < r.id))
    -- The part above `since` was dropped: what is not in the base was deleted there, and what is newer there is live.
    or r.rank < (select id from outbox.horizon) and r.since < (select id - 1 from outbox.horizon)
       and case when r.action = 'put' and not r.anew
                then not exists (select from outbox.base b where b.target = %(target)s and b.key = r.key
                                    and coalesce(outbox.repeats(b.headers), b.id) <= r.rank)
                else exists (select from outbox.base b where b.target = %(target)s and b.key = r.key
                                and coalesce(outbox.repeats(b.headers), b.id) > r.rank) end
