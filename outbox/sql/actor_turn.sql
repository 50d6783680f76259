-- Purpose: give those their turn that wait behind nothing of their key any more: due at once, and taken by their lane's
--   owner. `busy`: how many of a key are in the owner's hands without rows of their own, as far as the caller knows;
--   who is given a turn too early is sent back by actor_take. Comes back: those that were given one.
-- Locks: rows of outbox.parked; those that somebody else has locked are left to him. Tables: outbox.parked (update),
--   outbox.log (read). Called by: workers.actor.line.
with line as materialized (
  -- A range of one key, and its order, so that nothing but an index of keys will do: a million rows of others may be
  -- in front.
  select n.id, n.place, n.free
    from unnest(%(targets)s::text[], %(keys)s::text[], %(busy)s::int[]) as k (target, key, busy)
   cross join lateral (
           select p.id, outbox.turns(l.action) as turns from outbox.parked p join outbox.log l on l.id = p.id
            where p.target = k.target and p.key between k.key and k.key and p.reason = 'blocked'
            order by p.key, p.id limit 1) as first
   cross join lateral (
           select greatest(coalesce(first.turns, 1), 1) - k.busy - count(*) as free from outbox.parked p
            where p.target = k.target and p.key = k.key and p.reason = 'running') as hands
   cross join lateral (
           select w.id, row_number() over (order by w.id) as place, hands.free
             from (select p.id from outbox.parked p
                    where p.target = k.target and p.key between k.key and k.key and p.reason = 'blocked'
                    order by p.key, p.id limit 100) as w
            where hands.free > 0
              and (first.turns > 0 or not exists (
                     select from outbox.parked h
                      where h.target = k.target and h.key = k.key and h.id < first.id
                        and h.reason not in ('due', 'skipped') and not outbox.aside(h)))) as n
), turn as (
  select p.id from outbox.parked p
   where p.id = any (array(select l.id from line l where l.place <= l.free)) and p.reason = 'blocked'
     for update skip locked
)
update outbox.parked p set reason = 'retry', retry_at = outbox.now() where p.id = any (array(select id from turn))
returning p.id
