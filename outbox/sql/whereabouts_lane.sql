-- Purpose: an intent's lane: who drains it, where it is, whether it has passed the intent, since when, and how many
--   intents it has to pass before (counted up to a limit); whether a worker of actors has it in hand.
-- Locks: none. Tables: outbox.lane, outbox.position, outbox.tick, outbox.log, outbox.identity (read).
-- Called by: outbox.whereabouts.find.
with stand as (
  select l.*, coalesce(p.tick, (select min(id) from outbox.tick)) as tick, coalesce(p.upto, 0) as upto,
         coalesce(p.after, 0) as after, coalesce(%(id)s = any (p.open), false) as in_hand
    from outbox.lane l
    left join lateral (select tick, upto, after, open from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by seq desc limit 1) p on true
   where l.target = %(target)s and %(slot)s between l.slot_low and l.slot_high and l.target <> 'clock'
)
select s.target, s.lane, s.epoch, s.place, s.state, s.reason,
       s.owner is not null and s.lease_until > outbox.now() as drained, s.in_hand,
       i.log || '/' || t.id || '.' || t.nonce
         || case when s.upto > 0 then '+' || s.upto || '@' || s.after else '' end as position,
       coalesce(outbox.shows(t.first, t.high, t.snapshot, %(xid)s::text::xid8, %(id)s), false)
         or (s.after >= %(id)s and coalesce(outbox.shows(u.first, u.high, u.snapshot, %(xid)s::text::xid8, %(id)s), false)) as passed,
       (select p.at from outbox.position p
          join outbox.tick pt on pt.id = p.tick
          left join outbox.tick pu on pu.id = p.upto
         where p.target = s.target and p.lane = s.lane
           and (outbox.shows(pt.first, pt.high, pt.snapshot, %(xid)s::text::xid8, %(id)s)
                or (p.after >= %(id)s and coalesce(outbox.shows(pu.first, pu.high, pu.snapshot, %(xid)s::text::xid8, %(id)s), false)))
         order by p.seq limit 1) as passed_at,
       (select count(*) from (
          select from outbox.log l
           where l.target = s.target and l.slot between s.slot_low and s.slot_high
             and l.id > greatest(t.floor, s.after) and l.id < %(id)s
             and not outbox.shows(t.first, t.high, t.snapshot, l.xid, l.id)
           limit %(limit)s) as before) as before
  from stand s
 cross join outbox.identity i
  left join outbox.tick t on t.id = s.tick
  left join outbox.tick u on u.id = s.upto
