-- Purpose: a lane's newest position with its tick's nonce. A lane that never moved stands at the first tick. One whose
--   owner was suspended for longer than ticks are kept, and went on, may have written down a tick that was thinned: then
--   it stands at the nearest one before, and some of its intents come again.
-- Locks: none. Tables: outbox.position, outbox.tick, outbox.identity (read). Called by: outbox.lane.stand.
select i.log, t.id as tick, t.nonce,
       case when t.id = p.tick then p.upto else 0 end as upto, case when t.id = p.tick then p.after else 0 end as after
  from outbox.identity i
  left join lateral (select tick, upto, after from outbox.position
                      where target = %(target)s and lane = %(lane)s order by seq desc limit 1) p on true
  left join lateral (select n.id, n.nonce from outbox.tick n
                      where n.id <= coalesce(p.tick, (select min(id) from outbox.tick))
                      order by n.id desc limit 1) t on true
