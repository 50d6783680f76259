-- Purpose: remove rates of actors in which nothing has begun for long enough, a page of keys at a time. Comes back: the
--   page's last key. Keys with several rates are looked at together.
-- Locks: the rows removed. Tables: outbox.rate (delete). Called by: workers.clock.
with page as (
  select key from outbox.rate where key > %(after)s order by key limit %(limit)s
), gone as (
  delete from outbox.rate r where r.key in (select key from page) and r.expires_at <= outbox.now()
)
select max(key), count(*) from page
