-- Purpose: who has a lane now. Locks: none. Tables: outbox.lane (read). Called by: outbox.lane.claim.
select owner, place, greatest(0, extract(epoch from lease_until - outbox.now()))::float8 as seconds_left
  from outbox.lane where target = %(target)s and lane = %(lane)s
