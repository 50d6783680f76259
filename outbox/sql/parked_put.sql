-- Purpose: set intents aside. One that is parked already keeps its place and takes the new reason, and
--   one that an operator has skipped stays that.
-- Locks: rows of outbox.parked. Tables: outbox.parked (insert, update), outbox.log, outbox.base, outbox.horizon (read).
-- Called by: outbox.parked.put, in the transaction that holds the lane (outbox.lane.fence).
insert into outbox.parked as parked (id, target, slot, key, reason, attempts, retry_at, error, doubtful)
select p.id, l.target, l.slot, l.key, p.reason, p.attempts,
       case when p.reason = 'due' then l.due
            when p.reason = 'retry' then outbox.now() + make_interval(secs => p.wait) end,
       p.error, p.doubtful
  from unnest(%(id)s::bigint[], %(reason)s::text[], %(attempts)s::int[], %(wait)s::float8[], %(error)s::text[],
              %(doubtful)s::bool[])
       as p (id, reason, attempts, wait, error, doubtful)
  join lateral (select id, target, slot, key, due from outbox.log where id = p.id
                union all
                select id, target, slot, key, null from outbox.base
                 where id = p.id and id < (select h.id from outbox.horizon h)) as l on true
on conflict (id) do update
   set reason = excluded.reason, attempts = excluded.attempts, deaths = 0, trying = null, retry_at = excluded.retry_at,
       error = excluded.error, doubtful = parked.doubtful or excluded.doubtful
 where excluded.reason <> 'blocked' and parked.reason <> 'skipped'
