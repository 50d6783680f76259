-- Purpose: what is due of retries and delayed messages in our lanes, without locking or writing anything: messages that
--   were never in hand when a worker died (`plain`), that were once, or oftener; those that are to be given up; and those
--   that were skipped (`untold`).
-- Locks: none. Tables: outbox.lane, outbox.parked (read). Called by: workers.actor.retries.
with ours as (
  select l.target, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[]))
), queue as (
  select distinct target from ours
)
select q.target, bool_or(d.deaths = 0) as plain, bool_or(d.deaths = 1) as once,
       bool_or(d.deaths > 1 and not d.hopeless) as often, bool_or(d.hopeless) as hopeless, bool_or(d.untold) as untold
  from queue q
 cross join lateral (
       -- The oldest of each queue, and of those that may be deadly: neither hides the other.
       (select p.deaths, false as hopeless, false as untold from outbox.parked p
         where p.target = q.target and p.retry_at <= outbox.now() and p.reason in ('retry', 'due') and p.deaths = 0
           and exists (select from ours o where o.target = p.target and p.slot between o.slot_low and o.slot_high)
         order by p.retry_at limit 1)
       union all
       (select p.deaths, p.deaths >= %(most)s or (p.alone and p.deaths >= %(alone)s), false from outbox.parked p
         where p.target = q.target and p.retry_at <= outbox.now() and p.reason in ('retry', 'due') and p.deaths > 0
           and exists (select from ours o where o.target = p.target and p.slot between o.slot_low and o.slot_high)
         order by p.retry_at limit 1000)
       union all
       (select null, null, true from outbox.parked p
         where p.target = q.target and p.untold
           and exists (select from ours o where o.target = p.target and p.slot between o.slot_low and o.slot_high)
         limit 1)) as d
 group by q.target
