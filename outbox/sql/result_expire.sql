-- Purpose: remove results that have run out, a group at a time. Comes back: the time of the last one, from which the next
--   group is looked for: one that is removed stays in the index for as long as an old transaction might see it.
-- Locks: the rows removed. Tables: outbox.result (delete). Called by: workers.clock.
with gone as (
  delete from outbox.result r
   using (select key from outbox.result
           where expires_at <= outbox.now() and expires_at >= %(after)s order by expires_at limit %(limit)s) as old
   where r.key = old.key and r.expires_at <= outbox.now()
  returning r.expires_at
)
select max(expires_at), count(*) from gone
