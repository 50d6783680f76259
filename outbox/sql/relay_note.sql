-- Purpose: note steps of sagas before they are handed on. Those that the far side has told of already don't come back,
--   and are not handed on again.
-- Locks: rows of outbox.relayed; the lane row (share). Tables: outbox.relayed (insert, update), outbox.lane (lock).
-- Called by: workers.actor.relay.book.
with fence as (
  select from outbox.lane where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
)
insert into outbox.relayed as r (id, target)
select i.id, %(target)s from fence, unnest(%(ids)s::bigint[]) as i (id) order by i.id
on conflict (id) do update set relayed_at = outbox.now() where r.verdict is null
returning r.id
