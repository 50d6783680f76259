-- Purpose: the log as a whole: identity, era, last id drawn, newest tick and its age, the clock's owner, partitions,
--   and where it begins.
-- Locks: none. Tables: outbox.identity, outbox.era, outbox.tick, outbox.lane, outbox.horizon, the sequence (read).
-- Called by: outbox.status.read.
select i.log, e.number as era, e.halted, coalesce(pg_sequence_last_value('outbox.log_id'), 0) as last_id,
       t.id as tick, t.high, extract(epoch from outbox.now() - t.at)::float8 as tick_seconds,
       c.owner is not null and c.lease_until > outbox.now() as clock_runs, c.epoch as clock_epoch,
       case when c.state = 'stopped' then c.reason end as clock_stopped,
       (select count(*) from pg_inherits where inhparent = 'outbox.log'::regclass) as partitions,
       (select max((regexp_match(c.relname, '(\d+)$'))[1]::bigint + 1) * 1000000 - 1
          from pg_inherits h join pg_class c on c.oid = h.inhrelid
         where h.inhparent = 'outbox.log'::regclass) as room_until,
       h.id as first_id, h.tick as first_tick
  from outbox.identity i, (select * from outbox.era order by number desc limit 1) e, outbox.lane c,
       outbox.horizon h,
       (select * from outbox.tick order by id desc limit 1) t
 where c.target = 'clock' and c.lane = 0
