-- Purpose: transactions that have written to the log and not ended: their own intents wait for them. Others'
--   don't; but a prepared transaction that everybody forgot holds its rows for ever.
-- Locks: none. Tables: pg_locks, pg_stat_activity, pg_prepared_xacts (read). Called by: outbox.status.read.
select a.pid, null as prepared, extract(epoch from clock_timestamp() - a.xact_start)::float8 as seconds,
       a.state, a.application_name
  from pg_stat_activity a
 where a.datname = current_database()
   and exists (select from pg_locks k
                where k.pid = a.pid and k.relation = 'outbox.log'::regclass and k.mode = 'RowExclusiveLock')
union all
select null, x.gid, extract(epoch from clock_timestamp() - x.prepared)::float8, 'prepared', ''
  from pg_prepared_xacts x
 where x.database = current_database()
   and exists (select from pg_locks k join pg_locks own using (virtualtransaction)
                where k.pid is null and k.relation = 'outbox.log'::regclass and k.mode = 'RowExclusiveLock'
                  and own.transactionid = x.transaction)
 order by 3 desc nulls last
 limit 10
