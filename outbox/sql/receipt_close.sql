-- Purpose: record outcomes: closed for good, partial, or still open with what is known so far.
-- Locks: rows of outbox.receipt. Tables: outbox.receipt (update).
-- Called by: outbox.receipt.record, in the transaction that holds the lane (outbox.lane.fence).
update outbox.receipt r
   set state = n.state, evidence = r.evidence || n.evidence,
       closed_at = case when n.state = 'closed' then outbox.now() end
  from unnest(%(id)s::bigint[], %(state)s::text[], %(evidence)s::jsonb[]) as n (id, state, evidence)
 where r.id = n.id
