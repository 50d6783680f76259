-- Purpose: take part in queues, or go on doing so. Those whose lease has run out, or who are known to be gone, are
--   struck off. Comes back: everybody who takes part.
-- Locks: rows of outbox.consumer. Tables: outbox.consumer (all). Called by: workers.actor.share.
with struck as (
  delete from outbox.consumer c
   where c.target = any(%(targets)s) and c.owner <> %(owner)s
     and (c.lease_until < outbox.now() or c.owner = any(%(gone)s::uuid[]))
  returning c.target, c.owner
), me as (
  insert into outbox.consumer as c (target, owner, place, busy, lease_until)
  select w.target, %(owner)s, %(place)s, w.busy, outbox.now() + make_interval(secs => %(ttl)s)
    from unnest(%(targets)s::text[], %(busy)s::bool[]) as w (target, busy) order by w.target
  on conflict (target, owner) do update set busy = excluded.busy, lease_until = excluded.lease_until
  returning c.target, c.owner, c.place, c.busy
)
select target, owner, place, busy from me
union all
select c.target, c.owner, c.place, c.busy from outbox.consumer c
 where c.target = any(%(targets)s) and c.owner <> %(owner)s
   and not exists (select from struck s where s.target = c.target and s.owner = c.owner)
