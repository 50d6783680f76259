-- Purpose: one intent of the log, and whether a tick shows it yet.
-- Locks: none. Tables: outbox.log, outbox.tick, outbox.lane (read). Called by: outbox.whereabouts.find.
select l.id, l.target, l.action, l.key, l.slot, l.xid::text as xid, l.due, l.saga::text as saga, l.created_at,
       outbox.repeats(l.headers) as repeats,
       case when outbox.repeats(l.headers) is not null and l.headers #>> '{replay,operation}' ~ '^[0-9]{1,18}$'
            then (l.headers #>> '{replay,operation}')::bigint end as operation,
       octet_length(l.payload::text) as payload_bytes, l.payload::text as payload,
       outbox.shows(n.first, n.high, n.snapshot, l.xid, l.id) as ticked,
       c.owner is not null and c.lease_until > outbox.now() as clock_runs,
       case when c.state = 'stopped' then c.reason end as clock_stopped
  from outbox.log l, outbox.lane c, (select * from outbox.tick order by id desc limit 1) n
 where l.id = %(id)s and c.target = 'clock' and c.lane = 0
