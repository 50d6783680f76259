-- Purpose: who follows, and where. Locks: none. Tables: outbox.follower (read). Called by: outbox.follower.find.
select name, tick, note, since, seen_at, extract(epoch from outbox.now() - seen_at)::float8
  from outbox.follower order by tick, name
