-- Purpose: for each lane: owner, epoch, position, how many intents are behind it (counted up to a limit) and since
--   when. Behind means: committed and visible at the newest tick, and not passed; or passed, and in an actor's hands.
-- Locks: none. Tables: all but outbox.receipt (read). Called by: outbox.status.read.
with newest as (
  select * from outbox.tick order by id desc limit 1
), stand as (
  select l.*, coalesce(p.tick, (select min(id) from outbox.tick)) as tick, coalesce(p.upto, 0) as upto,
         coalesce(p.after, 0) as after, coalesce(p.open, '{}') as open
    from outbox.lane l
    left join lateral (select tick, upto, after, open from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by seq desc limit 1) p on true
)
select s.target, s.lane, s.epoch, s.owner is not null as owned, s.place,
       extract(epoch from s.lease_until - outbox.now())::float8 as lease_seconds,
       i.log || '/' || t.id || '.' || t.nonce
         || case when s.upto > 0 then '+' || s.upto || '@' || s.after else '' end as position,
       b.behind, extract(epoch from outbox.now() - b.oldest)::float8 as lag_seconds,
       s.state, s.reason, extract(epoch from outbox.now() - s.state_since)::float8 as state_seconds
  from stand s
 cross join outbox.identity i
 cross join newest n
  left join outbox.tick t on t.id = s.tick
 cross join lateral (
   select count(*) as behind, min(created_at) as oldest
     from (select l.created_at from outbox.log l
            where l.target = s.target and l.slot between s.slot_low and s.slot_high
              and l.id > greatest(t.floor, s.after) and l.id <= n.high
              and not outbox.shows(t.first, t.high, t.snapshot, l.xid, l.id)
              and outbox.shows(n.first, n.high, n.snapshot, l.xid, l.id)
           union all
           select l.created_at from outbox.log l
            where l.target = s.target and l.slot between s.slot_low and s.slot_high
              and l.xid = any (array(select pg_snapshot_xip(t.snapshot))) and l.id <= t.floor
              and l.id > greatest(s.after, t.first - 1) and outbox.shows(n.first, n.high, n.snapshot, l.xid, l.id)
           union all
           -- From the first tick, the base comes before the log.
           select b.created_at from outbox.base b, outbox.horizon h
            where t.high = 0 and b.target = s.target and b.slot between s.slot_low and s.slot_high
              and b.id > s.after and b.id < h.id
           union all
           select l.created_at from outbox.log l where l.id = any (s.open)
            limit %(limit)s) as waiting
 ) b
 where s.target <> 'clock'
 order by s.target, s.lane
