-- Purpose: a page of a partition, as it goes into the archive: with receipts, and with what was never applied.
-- Locks: none. Tables: outbox.log, outbox.receipt, outbox.parked, outbox.saga_void (read).
-- Called by: outbox.retention.archive.
select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text,
       l.created_at, l.xid::text::bigint,
       case when r.id is not null then
         jsonb_build_object('attempts', r.attempts, 'evidence', r.evidence, 'closed_at',
                            to_char(r.closed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) end,
       exists (select from outbox.parked p where p.id = l.id) or exists (select from outbox.saga_void v where v.id = l.id)
  from outbox.log l
  left join outbox.receipt r on r.id = l.id
 where l.id > %(after)s and l.id < %(until)s
 order by l.id limit %(limit)s
