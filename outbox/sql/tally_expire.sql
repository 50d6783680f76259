-- Purpose: remove numbers of rate limiters that have run out, a page of keys at a time. Comes back: the page's last key.
-- Locks: the rows removed. Tables: outbox.tally (delete). Called by: workers.clock.
with page as (
  select key, expires_at from outbox.tally where key > %(after)s order by key limit %(limit)s
), gone as (
  delete from outbox.tally t using page p
   where t.key = p.key and p.expires_at <= outbox.now() and t.expires_at <= outbox.now()
)
select max(key), count(*) from page
