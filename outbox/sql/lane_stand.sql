-- Purpose: a lane's newest position with its tick's nonce. A lane that never moved stands at the first tick.
-- Locks: none. Tables: outbox.position, outbox.tick, outbox.identity (read). Called by: outbox.lane.stand.
select i.log, t.id as tick, t.nonce, coalesce(p.upto, 0) as upto, coalesce(p.after, 0) as after
  from outbox.identity i
  left join lateral (select tick, upto, after from outbox.position
                      where target = %(target)s and lane = %(lane)s order by seq desc limit 1) p on true
  left join outbox.tick t on t.id = coalesce(p.tick, (select min(id) from outbox.tick))
