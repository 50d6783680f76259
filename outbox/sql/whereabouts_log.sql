-- Purpose: how far the ids of the log go: the last one drawn, and the first one that retention has left.
-- Locks: none. Tables: the sequence outbox.log_id, the catalog (read). Called by: outbox.whereabouts.find.
select coalesce(pg_sequence_last_value('outbox.log_id'), 0) as last_id,
       (select min((regexp_match(c.relname, '(\d+)$'))[1]::bigint) * 1000000
          from pg_inherits h join pg_class c on c.oid = h.inhrelid
         where h.inhparent = 'outbox.log'::regclass) as first_id
