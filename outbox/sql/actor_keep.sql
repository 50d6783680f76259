-- Purpose: keep the options that a message has got by a try, for the next one. The log's row never changes.
-- Locks: rows of outbox.receipt. Tables: outbox.receipt (insert, update), outbox.log (read).
-- Called by: workers.actor.ledger.
insert into outbox.receipt as r (id, target, slot, state, epoch, evidence)
select l.id, l.target, l.slot, 'partial', 0, jsonb_build_object('options', n.options::jsonb)
  from unnest(%(ids)s::bigint[], %(options)s::text[]) as n (id, options) join outbox.log l on l.id = n.id
on conflict (id) do update set evidence = excluded.evidence, attempts = r.attempts + 1 where r.state <> 'closed'
