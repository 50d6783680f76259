-- Purpose: every mail of the log with what is recorded of it: its token, whether the lane has passed it, its receipt.
--   Reads all of mail's rows once.
-- Locks: none. Tables: outbox.log, outbox.receipt, outbox.parked (read). Called by: workers.scrub.mail.
select coalesce(l.payload ->> 'token', '') as token, l.id, l.action,
       outbox.shows(%(first)s, %(high)s, %(snapshot)s, l.xid, l.id) and p.id is null as passed, p.reason as parked, r.state,
       coalesce(extract(epoch from r.opened_at)::float8, 0) as opened,
       coalesce(extract(epoch from r.closed_at)::float8, 0) as closed,
       array(select jsonb_object_keys(coalesce(r.evidence -> 'accepted', '{}'))) as accepted,
       coalesce(jsonb_array_length(r.evidence -> 'assumed'), 0) as assumed
  from outbox.log l
  left join outbox.receipt r on r.id = l.id
  left join outbox.parked p on p.id = l.id
 where l.target = 'mail' and l.action in ('send', 'prepare') and jsonb_typeof(l.payload) = 'object'
