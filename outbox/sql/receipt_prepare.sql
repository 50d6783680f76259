-- Purpose: store what is known of a batch, durably, before its prepared effects are released. The owner's epoch is
--   required, of the lane and of each receipt: nobody releases what a later owner may look at.
-- Locks: rows of outbox.receipt; the lane row (share). Tables: outbox.receipt (update), outbox.lane (lock).
-- Called by: outbox.receipt.prepared.
with fence as (
  select from outbox.lane where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
)
update outbox.receipt r
   set state = n.state, evidence = r.evidence || n.evidence,
       closed_at = case when n.state = 'closed' then outbox.now() end
  from fence, unnest(%(id)s::bigint[], %(state)s::text[], %(evidence)s::jsonb[]) as n (id, state, evidence)
 where r.id = n.id and r.epoch = %(epoch)s
