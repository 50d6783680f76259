-- Purpose: take intents out of the parking place, and let the next one of each of their keys have its turn.
-- Locks: rows of outbox.parked. Tables: outbox.parked (delete, update).
-- Called by: outbox.parked.remove, in the transaction that holds the lane (outbox.lane.fence).
with gone as (
  delete from outbox.parked where id = any(%(ids)s) returning id, target, key
), heads as (
  select distinct on (p.key) p.id, p.key, p.reason
    from outbox.parked p join gone g on p.target = g.target and p.key = g.key
   where p.id <> all(%(ids)s) and p.reason not in ('due', 'skipped')
   order by p.key, p.id
), turn as (
  update outbox.parked p set reason = 'retry', retry_at = outbox.now()
    from heads h where p.id = h.id and p.reason = 'blocked'  -- now: an operator may have skipped it meanwhile
)
select g.key, (select h.id from heads h where h.key = g.key) as head from gone g
