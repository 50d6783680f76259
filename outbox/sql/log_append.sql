-- Purpose: append intents, in order, in the application's transaction; one statement for any number.
-- Locks: none beyond an INSERT's. Tables: outbox.log (insert). Called by: outbox.session.
insert into outbox.log (target, action, key, payload, due, saga, headers)
select i.target, i.action, i.key, i.payload, i.due, i.saga, i.headers
  from unnest(%(target)s::text[], %(action)s::text[], %(key)s::text[], %(payload)s::jsonb[],
              %(due)s::timestamptz[], %(saga)s::uuid[], %(headers)s::jsonb[])
       with ordinality as i (target, action, key, payload, due, saga, headers, place)
 order by i.place
returning xid::text::bigint, id
