-- Purpose: record what became of messages that have rows of their own. Comes back: those that were still this holder's.
--   A null reason: done.
-- Locks: rows of outbox.parked. Tables: outbox.parked (update, delete). Called by: workers.actor.ledger.
with said as (
  select * from unnest(%(ids)s::bigint[], %(reasons)s::text[], %(attempts)s::int[], %(deaths)s::int[],
                       %(waits)s::float8[], %(errors)s::text[]) as s (id, reason, attempts, deaths, wait, error)
), gone as (
  delete from outbox.parked p using said s
   where p.id = s.id and s.reason is null and p.reason = 'running' and p.holder = %(holder)s
  returning p.id
), again as (
  update outbox.parked p
     set reason = s.reason, attempts = s.attempts, deaths = s.deaths, error = s.error,
         retry_at = case when s.reason = 'retry' then outbox.now() + make_interval(secs => s.wait) end
    from said s
   where p.id = s.id and s.reason is not null and p.reason = 'running' and p.holder = %(holder)s
  returning p.id
)
select id from gone union all select id from again
