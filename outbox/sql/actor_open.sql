-- Purpose: what the owner of a lane before left open: of messages that its actor acknowledged itself, nothing is left
--   to do. Locks: none. Tables: outbox.position, outbox.receipt, outbox.log (read). Called by: workers.actor.holding.
select o.id, coalesce(r.state = 'closed', false) as done
  from (select open from outbox.position where target = %(target)s and lane = %(lane)s order by seq desc limit 1) p
 cross join unnest(p.open) as o (id)
  left join outbox.receipt r on r.id = o.id
