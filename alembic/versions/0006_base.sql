-- The base: what the dropped part of the log still means.
--
-- Life of a partition of the log. It is filled, and every lane passes it. Once it is old enough, and nobody needs its
-- rows any more (outbox.held says who does), it is archived (outbox.archive says where), the last put of each key that
-- is live in it is carried into outbox.base, and it is dropped whole. From then on the log begins at the horizon, and
-- base + log rebuild a participant. The two don't overlap: the base counts for ids below outbox.horizon, the log for
-- those from there on. outbox/retention.py takes these steps; each can be repeated, and killed anywhere.
--
-- Whoever is about to read from further back than it is known to stand (a lane whose participant was restored, a
-- follower) writes that down under the shared advisory lock `outbox.horizon`. A drop holds the exclusive one while it
-- looks who stands where, and until it is committed. So nobody begins to need what is just going.
--
-- SQLSTATEs of our own: OB060 a partition can't be dropped (yet).
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

----------------------------------------------------------------------------------------------- ticks
-- Each tick says where the ids of its era begin (0007), so that reading needs no join.
alter table outbox.tick add first bigint not null default 1;

-- Whether a tick (its columns) shows the intent `id` of transaction `xid`. Of an earlier era it shows everything.
create function outbox.shows(first bigint, high bigint, snapshot pg_snapshot, xid xid8, id bigint) returns boolean
language sql immutable parallel safe
as $$ select id <= high and (id < first or pg_visible_in_snapshot(xid, snapshot)) $$;

------------------------------------------------------------------------------------------------ base
-- One row for each key that was live at the horizon, with the id of the intent that wrote it. Only the actions `put`
-- and `delete` say what a key's content is; other actions are events, and are gone with their partition.
create table outbox.base (
  target     text        not null,
  key        text        not null,
  id         bigint      not null,
  slot       smallint    not null generated always as
             ((('x' || pg_catalog.substr(pg_catalog.md5(key), 1, 4))::bit(16)::int & 16383)::smallint) stored,
  payload    jsonb       not null,
  headers    jsonb,
  created_at timestamptz not null,
  primary key (target, key)
);
create index base_id on outbox.base (target, id);
create unique index base_intent on outbox.base (id);

-- One row: up to where the log was dropped. A position at an earlier tick than `tick` can't go on in the log (the
-- first tick, where a participant begins that holds nothing, can: by way of the base).
create table outbox.horizon (
  only_row boolean primary key default true check (only_row),
  id       bigint  not null default 1,  -- the first id that is still in the log
  tick     bigint  not null default 1,  -- the earliest tick that shows everything below it
  -- The newest tick when it moved. A participant that had begun to read the base before that can't go on in it.
  moved    bigint  not null default 1
);
insert into outbox.horizon default values;

-- What a participant that keeps its own position held when the lane was there: by that, a lane finds that the
-- participant is just as its last owner left it, although the lane has gone on over ticks with nothing for it.
alter table outbox.position add column own text;

-- Everything up to the position is done, but for these: messages that a worker of actors (0009) has in hand.
alter table outbox.position add column open bigint[] not null default '{}';

------------------------------------------------------------------------------------------- followers
-- Who else reads the log (another site, a resilver, a long replay): it needs everything that `tick` doesn't show.
-- Never expires by itself: outbox status warns about one that was not seen for long.
create table outbox.follower (
  name    text        primary key check (name ~ '^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,99}$'),
  tick    bigint      not null,
  note    text        not null default '' check (pg_catalog.length(note) <= 200),
  since   timestamptz not null default outbox.now(),
  seen_at timestamptz not null default outbox.now()
);

-------------------------------------------------------------------------------------------- archives
-- Where each partition went. Kept: a row for each million intents.
create table outbox.archive (
  first      bigint      primary key,  -- its first id
  until      bigint      not null unique check (until > first),  -- the first id after it
  intents    bigint      not null,
  place      text        not null,     -- a directory, s3://BUCKET/PREFIX, or `none`
  name       text        not null,
  sha256     text        not null check (sha256 ~ '^([0-9a-f]{64})?$'),
  bytes      bigint      not null,
  who        text        not null default session_user,
  client     text        not null default '',
  made_at    timestamptz not null default outbox.now(),
  carried_at timestamptz,
  dropped_at timestamptz
);

----------------------------------------------------------------------------------------- looking
-- The partitions that the log has, the oldest first.
create view outbox.partition as
  select c.relname::text as name, greatest(n.n * 1000000, 1) as first, (n.n + 1) * 1000000 as until
    from pg_catalog.pg_inherits h
    join pg_catalog.pg_class c on c.oid = h.inhrelid
   cross join lateral (select (pg_catalog.regexp_match(c.relname::text, '^log_([0-9]+)$'))[1]::bigint as n) as n
   where h.inhparent = 'outbox.log'::regclass
   order by n.n;

-- The earliest tick that shows everything below id `until` that will ever be committed; null: there is none yet.
-- Whoever draws an id above floor(d) may have any xid; but those below `until` belong to xids that were given out
-- before tick d (docs/explanation/log-and-ticks.md), and once a snapshot's xmin has reached xmax(d) they have all ended.
-- A later era's first tick shows all that came before it.
create function outbox.cut(until bigint) returns bigint
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select t.id
    from (select id, first, pg_snapshot_xmax(snapshot) as xmax from outbox.tick
           where floor >= cut.until - 1 order by id limit 1) as d
   cross join lateral (select id from outbox.tick
                        where id >= d.id and (first > d.first or pg_snapshot_xmin(snapshot) >= d.xmax)
                        order by id limit 1) as t
$$;

-- Who needs what lies below id `until`, where tick `cut` shows all of that. No row: nobody.
--   lane      has not passed an intent of its own there, or has one in hand
--   follower  stands before `cut`
--   parked    intents that are not done (`name` is the first of them); what was skipped is done with
--   receipt   attempts whose outcome is not known, or that are done in part
--   saga      intents of sagas that have not ended
-- Locks nobody out. Reads the rows below `until` once for each lane that stands before `cut`, and once for sagas.
create function outbox.held(until bigint, cut bigint)
returns table (kind text, name text, count bigint, since timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp set enable_seqscan = on
as $$
  select 'lane', l.target || '/' || l.lane, 1::bigint, coalesce(p.at, r.registered_at)
    from outbox.lane l
    join outbox.participant r on r.target = l.target
    left join lateral (select p.tick, p.at from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
    left join outbox.tick t on t.id = coalesce(p.tick, (select min(id) from outbox.tick))
   where l.target <> 'clock' and (t.id is null or t.id < held.cut)
     and exists (select from outbox.log g
                  where g.id < held.until and g.target = l.target and g.slot between l.slot_low and l.slot_high
                    and (t.id is null or not outbox.shows(t.first, t.high, t.snapshot, g.xid, g.id)))
  union all
  select 'lane', l.target || '/' || l.lane, cardinality(p.open), p.at
    from outbox.lane l
   cross join lateral (select p.open, p.at from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p
   where exists (select from unnest(p.open) as o (id) where o.id < held.until)
  union all
  select 'follower', f.name, 1, f.seen_at from outbox.follower f where f.tick < held.cut
  union all
  select 'parked', min(k.id)::text, count(*), min(k.parked_at) from outbox.parked k
   where k.id < held.until and k.reason <> 'skipped' having count(*) > 0
  union all
  select 'receipt', min(r.id)::text, count(*), min(r.opened_at) from outbox.receipt r
   where r.id < held.until and r.state <> 'closed' having count(*) > 0
  union all
  select 'saga', min(s.id::text), count(distinct s.id), min(s.started_at)
    from outbox.log g
    join outbox.saga s on s.id::text = case when g.target = 'saga' then g.key else g.saga::text end
   where g.id < held.until and (g.target = 'saga' or g.saga is not null) and s.ended_at is null
  having count(*) > 0
$$;

----------------------------------------------------------------------------------------- going
-- Raises OB060 unless the oldest partition is the one that ends before `until`, and nobody needs it. Returns its cut.
create function outbox.check_droppable(until bigint) returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  cut    bigint := outbox.cut(until);
  holder record;
begin
  if (select p.until from outbox.partition p limit 1) is distinct from check_droppable.until then
    raise exception using errcode = 'OB060', message = 'it is not the oldest partition of the log',
      hint = 'Drop the older ones first.';
  end if;
  if cut is null then
    raise exception using errcode = 'OB060', message = 'a transaction is open that may have written to it',
      hint = 'End that transaction, or let the clock run.';
  end if;
  select h.* into holder from outbox.held(until, cut) as h limit 1;
  if found then
    raise exception using errcode = 'OB060', message = 'it is held by ' || holder.kind || ' ' || holder.name,
      hint = 'See outbox retention --dry-run.';
  end if;
  return cut;
end $$;

-- Carries what is live in the partition that ends before `until` into the base, in the caller's transaction. Takes no
-- lock on the log. Nothing sees the base's new rows before the horizon has moved, because their ids are above it; and
-- the log has them until then. Again is the same. Returns how many rows it changed.
create function outbox.carry(until bigint) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = on
as $$
declare
  cut     constant bigint := outbox.check_droppable(until);
  changed bigint;
begin
  if not exists (select from outbox.archive a where a.until = carry.until) then
    raise exception using errcode = 'OB060', message = 'it is not archived', hint = 'Archive it first.';
  end if;
  -- The last word about each key, as outbox.word (0008) has it: a repetition ranks where the repeated intent stands, and
  -- what is parked (that is: skipped) or void was never applied.
  with last as materialized (
    select distinct on (w.target collate "C", w.key collate "C")
           w.id, w.rank, w.target, w.action, w.key, w.payload, w.headers, w.created_at
      from outbox.word w
     where not w.based and w.id < carry.until and w.action in ('put', 'delete') and w.parked is null and not w.void
     order by w.target collate "C", w.key collate "C", w.rank desc, w.id desc
  ), gone as (
    delete from outbox.base b using last
     where b.target = last.target and b.key = last.key and last.action = 'delete'
       and (coalesce(outbox.repeats(b.headers), b.id), b.id) < (last.rank, last.id)
    returning 1
  ), kept as (
    insert into outbox.base as b (target, key, id, payload, headers, created_at)
      select target, key, id, payload, headers, created_at from last where action = 'put'
       order by target collate "C", key collate "C"
      on conflict (target, key) do update
         set id = excluded.id, payload = excluded.payload, headers = excluded.headers, created_at = excluded.created_at
       where (coalesce(outbox.repeats(b.headers), b.id), b.id)
             < (coalesce(outbox.repeats(excluded.headers), excluded.id), excluded.id)
    returning 1
  )
  select (select count(*) from gone) + (select count(*) from kept) into changed;
  update outbox.archive a set carried_at = outbox.now() where a.until = carry.until;
  return changed;
end $$;

-- Drops the partition that ends before `until`, if that is archived and carried, nobody needs it, and everything in it
-- was committed `age` ago at least. Returns false if it is gone already.
--
-- DROP TABLE takes the exclusive lock on the whole log, and who writes waits behind it. It is held for the changes of
-- the catalog and the commit; the files go after that. But it has to be got first: while a transaction that has written
-- to the log is open, it can't be, and everybody else would wait in the queue behind us. So it is waited for no longer
-- than lock_timeout; the caller tries again. (DETACH CONCURRENTLY would wait without a queue, but can't run in a
-- function, which is what gives the right to do this to a worker and to nobody else; and it leaves a third state
-- behind when it is killed. ATTACH needs no such care: it excludes no writer.)
create function outbox.drop_partition(until bigint, age interval) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  cut  bigint;
  name text;
begin
  perform pg_advisory_xact_lock(hashtextextended('outbox.horizon', 0));
  if (select h.id from outbox.horizon h) >= drop_partition.until then
    return false;
  end if;
  cut := outbox.check_droppable(until);
  if not exists (select from outbox.archive a where a.until = drop_partition.until and a.carried_at is not null) then
    raise exception using errcode = 'OB060', message = 'it is not archived and carried', hint = 'Do that first.';
  end if;
  if not exists (select from outbox.tick t where t.id = cut and t.at <= outbox.now() - drop_partition.age) then
    raise exception using errcode = 'OB060', message = 'it is not old enough', hint = 'Wait, or ask for a smaller age.';
  end if;
  select p.name into name from outbox.partition p limit 1;
  update outbox.horizon h set id = drop_partition.until, tick = cut, moved = (select max(id) from outbox.tick);
  update outbox.archive a set dropped_at = outbox.now() where a.until = drop_partition.until;
  -- Last, so that the lock is held for as short as can be.
  execute 'drop table outbox.' || quote_ident(name);
  return true;
end $$;

----------------------------------------------------------------------------------------- forgetting
-- Removes what is known about intents that are dropped, `most` rows at a time: closed receipts (they are in the
-- archive), what was skipped, and what sagas recalled. The audit trail stays; so does what is about a row of the base,
-- which a participant that is rebuilt is given. Returns how many it removed.
create function outbox.forget_dropped(most int default 10000) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with receipts as (
    delete from outbox.receipt where id = any (array(
      select r.id from outbox.receipt r, outbox.horizon h where r.id < h.id and r.state = 'closed'
         and not exists (select from outbox.base b where b.id = r.id) order by r.id limit most))
    returning 1
  ), skipped as (
    delete from outbox.parked where id = any (array(
      select p.id from outbox.parked p, outbox.horizon h where p.id < h.id and p.reason = 'skipped'
         and not exists (select from outbox.base b where b.id = p.id) order by p.id limit most))
    returning 1
  ), void as (
    delete from outbox.saga_void where id = any (array(
      select v.id from outbox.saga_void v, outbox.horizon h where v.id < h.id order by v.id limit most))
    returning 1
  )
  select (select count(*) from receipts) + (select count(*) from skipped) + (select count(*) from void)
$$;

-- Removes sagas that ended `age` ago at least, with their steps and what happened to them, `most` at a time; a child
-- not before its parent. Whoever starts one under the same key after that starts a new one. Returns how many it removed.
create function outbox.forget_sagas(age interval, most int default 1000) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with gone as (
    delete from outbox.saga where id = any (array(
      select s.id from outbox.saga s
       where s.ended_at <= outbox.now() - age
         and not exists (select from outbox.saga p where p.id = s.parent)
       order by s.ended_at limit most))
    returning 1
  )
  select count(*) from gone
$$;
create index saga_ended on outbox.saga (ended_at) where ended_at is not null;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.base, outbox.horizon, outbox.follower, outbox.archive, outbox.partition from public;
revoke all on function outbox.shows(bigint, bigint, pg_snapshot, xid8, bigint), outbox.cut(bigint),
  outbox.held(bigint, bigint), outbox.check_droppable(bigint),
  outbox.carry(bigint), outbox.drop_partition(bigint, interval), outbox.forget_dropped(int),
  outbox.forget_sagas(interval, int) from public;
grant select on outbox.base, outbox.horizon to outbox_app, outbox_worker, outbox_operator, outbox_reader;
grant select on outbox.follower, outbox.archive, outbox.partition to outbox_worker, outbox_operator, outbox_reader;
grant insert, update (tick, note, seen_at), delete on outbox.follower to outbox_worker, outbox_operator;
grant insert (first, until, intents, place, name, sha256, bytes, client),
      update (intents, place, name, sha256, bytes, client) on outbox.archive to outbox_worker, outbox_operator;
grant execute on function outbox.shows(bigint, bigint, pg_snapshot, xid8, bigint)
   to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.cut(bigint), outbox.held(bigint, bigint)
   to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.carry(bigint), outbox.drop_partition(bigint, interval), outbox.forget_dropped(int),
  outbox.forget_sagas(interval, int) to outbox_worker, outbox_operator;

reset role;
