-- Purpose: take parked messages in hand whose time has come. Each is counted as tried, and as one more death, before it
--   is tried; recording the outcome takes the death back. `alone`: nothing else is in hand of this process.
-- Locks: the rows returned; the lanes' rows (share). Tables: outbox.parked (update), outbox.lane (lock), outbox.log,
--   outbox.receipt (read). Called by: workers.actor.retries.
with fence as (
  select l.target, l.lane, l.slot_low, l.slot_high from outbox.lane l
   where (l.target, l.lane, l.epoch) in
         (select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[])) for share
), ready as (
  select p.id from outbox.parked p join fence f on f.target = p.target and p.slot between f.slot_low and f.slot_high
   where p.target = %(target)s and p.reason in ('retry', 'due') and p.retry_at <= outbox.now()
     and p.deaths between %(least)s and %(most)s
   order by p.deaths, p.retry_at, p.id limit %(limit)s
     for update of p skip locked
), taken as (
  update outbox.parked p
     set reason = 'running', holder = %(holder)s, trying = null, retry_at = null, attempts = p.attempts + 1,
         deaths = p.deaths + 1, alone = %(alone)s
    from ready where p.id = ready.id
  returning p.id, p.attempts, p.deaths
)
select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text,
       t.attempts, t.deaths, r.evidence -> 'options' as options
  from taken t join outbox.log l on l.id = t.id left join outbox.receipt r on r.id = t.id
 order by l.id
