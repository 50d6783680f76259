-- Purpose: how many intents a second the lanes of a participant have passed lately, at their best, all lanes together;
--   null if they have not had enough to do. Best, because most of the time they wait for work.
-- Locks: none. Tables: outbox.position, outbox.tick, outbox.lane, outbox.log (read). Called by: outbox.replay.plan.
with recent as (
  select p.lane, p.seq, p.at, coalesce(nullif(p.after, 0), t.high) as reached
    from (select * from outbox.position where target = %(target)s order by seq desc limit 300) as p
    join outbox.tick t on t.id = p.tick
), pair as (
  select lane, at - lag(at) over each as took, lag(reached) over each as before, reached
    from recent window each as (partition by lane order by seq)
), passed as (
  select l.lane, extract(epoch from p.took)::float8 as seconds,
         (select count(*) from outbox.log i
           where i.id > p.before and i.id <= p.reached and i.target = l.target
             and i.slot between l.slot_low and l.slot_high) as intents
    from pair p join outbox.lane l on l.target = %(target)s and l.lane = p.lane
   where p.took > interval '0' and p.reached - p.before between 20 and 100000
)
select sum(best)::float8
  from (select lane, max(intents / seconds) as best from passed where intents >= 20 group by lane) as lanes
