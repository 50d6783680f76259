-- Purpose: take parked messages in hand whose time has come. Each is counted as tried, and as one more death, before it
--   is tried; recording the outcome takes the death back. One whose turn it isn't (outbox.turns) waits for that, and
--   comes back as its id only. `busy`: how many of each key are in this owner's hands without rows of their own.
--   `alone`: nothing else is in hand of this process.
-- Locks: the rows returned; the lanes' rows (share). Tables: outbox.parked (update), outbox.lane (lock), outbox.log,
--   outbox.receipt, outbox.saga_void (read). Called by: workers.actor.retries.
with fence as (
  select l.target, l.lane, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[])) for share
), ready as (
  select p.id, p.key, p.attempts from outbox.parked p
    join fence f on f.target = p.target and p.slot between f.slot_low and f.slot_high
   where p.target = %(target)s and p.reason in ('retry', 'due') and p.retry_at <= outbox.now()
     and p.deaths between %(least)s and %(most)s
   order by p.deaths, p.retry_at, p.id limit %(limit)s
     for update of p skip locked
), line as (
  select r.id, r.key, r.attempts, outbox.turns(l.action) as turns,
         row_number() over (partition by r.key order by r.id) as place
    from ready r join outbox.log l on l.id = r.id
), judged as (
  select i.id,
         case when i.turns is null then true
              -- Recalled by its saga, and never tried: it is not run.
              when i.attempts = 0 and exists (select from outbox.saga_void v where v.id = i.id) then true
              when i.turns = 0 and (i.place > 1 or exists (
                     select from outbox.parked h
                      where h.target = %(target)s and h.key = i.key and h.id < i.id
                        and h.reason not in ('due', 'skipped') and not outbox.aside(h))) then false
              else i.place + hands.running + coalesce(busy.running, 0) <= greatest(i.turns, 1) end as turn
    from line i
   cross join lateral (select count(*) as running from outbox.parked h
                        where i.turns is not null and h.target = %(target)s and h.key = i.key and h.reason = 'running')
           as hands
    left join unnest(%(busy)s::text[], %(counts)s::int[]) as busy (key, running) on busy.key = i.key
), waits as (
  update outbox.parked p set reason = 'blocked', retry_at = null
   where p.id = any (array(select j.id from judged j where not j.turn))
  returning p.id
), taken as (
  update outbox.parked p
     set reason = 'running', holder = %(holder)s, trying = null, retry_at = null, attempts = p.attempts + 1,
         deaths = p.deaths + 1, alone = %(alone)s
   where p.id = any (array(select j.id from judged j where j.turn))
  returning p.id, p.attempts, p.deaths
)
select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text,
       t.attempts, t.deaths, r.evidence -> 'options' as options
  from taken t join outbox.log l on l.id = t.id left join outbox.receipt r on r.id = t.id
union all
select w.id, null, null, null, null, null, null, null, null, null, null from waits w
 order by 1
