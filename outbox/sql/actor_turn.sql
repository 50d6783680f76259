-- Purpose: give those their turn that wait behind nothing of their key any more: due at once, and taken by their lane's
--   owner. `busy`: how many of a key are in the owner's hands without rows of their own, as far as the caller knows;
--   who is given a turn too early is sent back by actor_take. Comes back: how many were given one.
-- Locks: rows of outbox.parked; those that somebody else has locked are left to him. Tables: outbox.parked (update),
--   outbox.log (read). Called by: workers.actor.line.
with turn as (
  select n.id
    from unnest(%(targets)s::text[], %(keys)s::text[], %(busy)s::int[]) as k (target, key, busy)
   cross join lateral (
           select p.id, outbox.turns(l.action) as turns from outbox.parked p join outbox.log l on l.id = p.id
            where p.target = k.target and p.key = k.key and p.reason = 'blocked' order by p.id limit 1) as first
   cross join lateral (
           select k.busy + count(*) as hands from outbox.parked p
            where p.target = k.target and p.key = k.key and p.reason = 'running') as now
   cross join lateral (
           select p.id from outbox.parked p
            where p.target = k.target and p.key = k.key and p.reason = 'blocked'
              and (first.turns > 0 or not exists (
                     select from outbox.parked h
                      where h.target = k.target and h.key = k.key and h.id < first.id
                        and h.reason not in ('due', 'skipped') and not outbox.aside(h)))
            order by p.id limit greatest(0, greatest(coalesce(first.turns, 1), 1) - now.hands)
              for update skip locked) as n
)
update outbox.parked p set reason = 'retry', retry_at = outbox.now() from turn where p.id = turn.id and p.reason = 'blocked'
