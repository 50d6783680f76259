-- Purpose: the partitions that are full, the oldest first: what they hold (by the statistics, if there are any), since
--   when everything in them is committed, and where they are archived.
-- Locks: none. Tables: outbox.partition, outbox.tick, outbox.archive, the sequence, the catalog (read).
-- Called by: outbox.retention.plan.
select p.name, p.first, p.until,
       case when c.reltuples >= 0 then c.reltuples::bigint
            else (select count(*) from outbox.log g where g.id >= p.first and g.id < p.until) end as intents,
       pg_total_relation_size(c.oid) as bytes, t.id as cut, t.at, extract(epoch from outbox.now() - t.at)::float8 as seconds, a.place, a.name as archive
  from outbox.partition p
  join pg_class c on c.relname = p.name and c.relnamespace = 'outbox'::regnamespace
  left join outbox.tick t on t.id = outbox.cut(p.until)
  left join outbox.archive a on a.first = p.first
 where p.until <= coalesce(pg_sequence_last_value('outbox.log_id'), 0) + 1
 order by p.first
