-- Purpose: after the database was lost: which messages it has as being in our hands. Those that we know nothing of
--   (`known`: all that we do) were taken by a statement whose answer never came, and weren't begun: they go back.
-- Locks: rows of outbox.parked. Tables: outbox.parked (update, read). Called by: workers.actor.retries.
with back as (
  update outbox.parked p
     set reason = 'retry', retry_at = outbox.now(), attempts = p.attempts - 1, deaths = p.deaths - 1
   where p.reason = 'running' and p.target = any(%(targets)s) and p.holder = %(holder)s and p.id <> all(%(known)s)
  returning p.id
)
select p.id from outbox.parked p
 where p.reason = 'running' and p.target = any(%(targets)s) and p.holder = %(holder)s and p.id = any(%(known)s)
