-- Purpose: parked intents that an operator asks for, in the order of the log.
-- Locks: none. Tables: outbox.parked, outbox.log, outbox.lane (read). Called by: outbox.decision.find.
select p.id, p.target, coalesce(l.action, 'put') as action, p.key, p.reason, p.attempts, p.deaths,
       coalesce(p.trying = a.epoch and a.owner is not null, false) as trying,
       p.retry_at, extract(epoch from p.retry_at - outbox.now())::float8 as retry_seconds,
       p.parked_at, extract(epoch from outbox.now() - p.parked_at)::float8 as parked_seconds, p.error
  from outbox.parked p
  left join outbox.log l on l.id = p.id
  left join outbox.lane a on a.target = p.target and p.slot between a.slot_low and a.slot_high
 where (%(ids)s::bigint[] is null or p.id = any(%(ids)s))
   and (%(target)s::text is null or p.target = %(target)s)
   and (%(reasons)s::text[] is null or p.reason = any(%(reasons)s))
   and (%(key)s::text is null or p.key = %(key)s)
   and (%(key_prefix)s::text is null or starts_with(p.key, %(key_prefix)s))
   and (%(older_than)s::float8 is null or p.parked_at < outbox.now() - make_interval(secs => %(older_than)s))
   and (%(error)s::text is null or strpos(lower(p.error), lower(%(error)s)) > 0)
 order by p.id
 limit %(limit)s
