-- Purpose: what earlier owners of the lane left open, and is not parked as in doubt already.
-- Locks: none. Tables: outbox.receipt, outbox.log, outbox.base, outbox.horizon, outbox.parked (read). Called by: outbox.receipt.doubts.
select l.id, l.target, l.action, l.key, l.payload::text, l.due, l.saga, l.headers::text, r.opened_at, r.evidence,
       r.adopted
  from outbox.receipt r
  join lateral (select id, target, action, key, payload, due, saga, headers from outbox.log where id = r.id
                union all
                select id, target, 'put', key, payload, null, null, headers from outbox.base
                 where id = r.id and id < (select h.id from outbox.horizon h)) as l on true
 where r.state = 'open' and r.target = %(target)s and r.slot between %(slot_low)s and %(slot_high)s
   and r.epoch < %(epoch)s
   and not exists (select from outbox.parked p where p.id = r.id and p.reason = 'in_doubt')
 order by l.id
