-- Purpose: what the lanes of each participant have not done, and how much of it is parked to be tried by itself.
-- Locks: none. Tables: by outbox.unapplied the lanes, ticks, log and what is parked. Called by: outbox.adoption.plan.
select l.target, count(u.id) as not_done, count(k.id) as parked
  from (select distinct target from outbox.lane where target <> 'clock') as l
  left join outbox.unapplied() u on u.target = l.target
  left join outbox.parked k on k.id = u.id
 group by l.target order by l.target
