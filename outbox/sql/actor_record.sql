-- Purpose: append where lanes of actors are, with what they have claimed and is not done yet. Comes back: the lanes whose
--   epoch is current; nothing is written for the others.
-- Locks: the lanes' rows (share), until commit. Tables: outbox.position (insert), outbox.lane (lock).
-- Called by: workers.actor.ledger.
with want as (
  select * from unnest(%(targets)s::text[], %(lanes)s::smallint[], %(epochs)s::bigint[], %(ticks)s::bigint[],
                       %(uptos)s::bigint[], %(afters)s::bigint[], %(opens)s::text[])
                as w (target, lane, epoch, tick, upto, after, open)
), fence as (
  select l.target, l.lane from outbox.lane l
   where (l.target, l.lane, l.epoch) in (select w.target, w.lane, w.epoch from want w) for share
)
insert into outbox.position (target, lane, epoch, tick, upto, after, open)
select w.target, w.lane, w.epoch, w.tick, w.upto, w.after, w.open::bigint[] from want w join fence using (target, lane)
returning target, lane
