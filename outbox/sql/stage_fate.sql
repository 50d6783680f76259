-- Purpose: whether staged files are still needed, by the transactions that staged them (arrays name and xid):
--     foreign   this database has not come to that transaction: it is from another history (or it ended while
--               this statement ran)
--     running   the transaction is not over (or it is prepared)
--     aborted   it was rolled back
--     unused    it committed without an intent that names the file (a savepoint was rolled back)
--     pending   its intent is not done: its lane is not past it, or it is parked, or it names the file deep
--               inside its payload, like the input of a saga that has not ended
--     done      every intent that names it is behind every lane, and none of them is parked
--   All of it in one snapshot: a transaction that commits meanwhile counts as running. A transaction too old
--   for pg_xact_status is taken as committed, so that its intents decide. An intent that names the file has
--   committed whatever this server says of its xid, which can be of an earlier era.
-- Locks: none. Tables: outbox.log, outbox.parked, outbox.saga, pg_locks (read); by outbox.reached the lanes and ticks.
-- Called by: workers.sweeper.
with stage as materialized (
  select name, xid from unnest(%(name)s::text[], %(xid)s::xid8[]) as s (name, xid)
), ended as materialized (
  select x.xid,
         case when x.xid >= pg_snapshot_xmax(pg_current_snapshot()) then
                -- Above the snapshot there are no more than the running transactions; each holds its own lock.
                case when exists (select from pg_locks k
                                   where k.locktype = 'transactionid' and k.granted and k.transactionid = x.xid::xid)
                     then 'running' else 'foreign' end
              when not pg_visible_in_snapshot(x.xid, pg_current_snapshot()) then 'running'
              -- Only here: it raises an error for the transactions of the first branch.
              else coalesce(pg_xact_status(x.xid), 'committed') end as status
    from (select distinct xid from stage) as x
), mention as materialized (
  -- Every staged file that an intent of these transactions names. A step of its own, so that a transaction of
  -- a million intents is read once and not once for each of its files.
  select e.xid, l.id, l.target, l.key, found.stage #>> '{}' as name, l.payload ->> 'stage' as top
    from ended e
   cross join lateral (select id, target, key, payload from outbox.log where xid = e.xid) as l
   cross join lateral jsonb_path_query(l.payload, 'strict $.**.stage') as found (stage)
), named as materialized (
  select m.id, m.xid, m.target, m.name,
         -- A saga that has ended has published it, or never will.
         m.top is distinct from m.name
         and not (m.target = 'saga' and exists (select from outbox.saga g
                                                 where g.id::text = m.key and g.ended_at is not null)) as deep
    from mention m join stage s on s.name = m.name and s.xid = m.xid
), passed as materialized (
  -- By the last intent: whichever era it is of, a lane that has passed that one has passed them all.
  select xid, target, outbox.reached(xid, target, id) as reached
    from (select xid, target, max(id) as id from named group by xid, target) as n
), use as (
  select n.name,
         bool_or(n.deep or not p.reached or exists (select from outbox.parked k where k.id = n.id)) as pending
    from named n join passed p on p.xid = n.xid and p.target = n.target
   group by n.name
)
select s.name,
       case when u.pending then 'pending'
            when u.name is not null then 'done'
            when e.status <> 'committed' then e.status
            else 'unused' end
  from stage s join ended e on e.xid = s.xid left join use u on u.name = s.name
