-- Histories: in which server the log was written, and since when.
--
-- An xid and a snapshot mean something only where their transactions ran. A log that was restored from a dump is read
-- in a server whose xids count something else; one that was restored to an earlier point, or taken over by a standby,
-- has lost what came after, although its effects may have been made. So the log has eras. The newest one is written in
-- this server; an earlier one is closed, and everything in it was committed. `outbox.adopt` opens the next era.
--
-- Within an era everything is as in 0001. Between eras the ids decide, for they are in one order in all of them:
--
--   era 1  first = 1    ticks 1 … E     E shows all of the era, in the era's own xids
--   era 2  first = B    ticks O …       O = E + 1 shows all ids below B, and nothing from there on
--
-- E and O are one place: a reader goes from its tick to E, then stands at O without having read anything more.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

create table outbox.era (
  number   int         primary key,
  -- The era's first tick, and a bound on its ids: nothing written in it has a smaller one.
  opened   bigint      not null,
  first    bigint      not null,
  -- Where it is written. `relation` is outbox.log's oid: a restored table has another. `database` is the database's
  -- oid, noted by the first worker: a database that was never drained may be copied (CREATE DATABASE … TEMPLATE).
  server   text        not null,
  relation bigint      not null,
  database bigint,
  timeline text        not null,
  -- Set when somebody has seen that the log went back without Postgres knowing: no lane goes on in this era.
  halted   text,
  -- Why it was opened; and by whom, as in outbox.operation.
  reason   text        not null,
  who      text        not null default session_user,
  client   text        not null default '',
  at       timestamptz not null default pg_catalog.clock_timestamp()
);

-- Where we are. The timeline is that of the write-ahead log, which changes at once when a backup is restored to a
-- point or a standby is promoted; the control file follows with the next checkpoint. Null on a standby.
create function outbox.here(out server text, out relation bigint, out database bigint, out timeline text)
language sql stable
as $$
  select (select system_identifier::text from pg_catalog.pg_control_system()),
         'outbox.log'::pg_catalog.regclass::oid::bigint,
         (select oid::bigint from pg_catalog.pg_database where datname = pg_catalog.current_database()),
         case when not pg_catalog.pg_is_in_recovery()
              then pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end
$$;

-- Whether this is still the timeline of the newest era, and nobody has halted it: what changes under an open
-- connection, or one of a pooler's. The clock asks with each tick, the owner of a lane with each renewal.
create function outbox.goes_on() returns boolean
language sql stable
as $$
  select e.halted is null
         and e.timeline = pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8)
    from outbox.era e order by e.number desc limit 1
$$;

insert into outbox.era (number, opened, first, server, relation, timeline, reason)
select 1, (select min(id) from outbox.tick), 1, h.server, h.relation, h.timeline, 'made' from outbox.here() as h;

-- Each tick says where its era's ids begin (0006), so that reading needs no join: outbox.shows.

-- Whether every lane of `target` has passed the commit of transaction `xid` (for read-your-writes). `id` is one of its
-- intents, and tells its era; without one it is of the newest.
drop function outbox.reached(xid8, text);
create function outbox.reached(xid xid8, target text, id bigint default null) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(bool_and(coalesce(
           case when t.first = e.first then pg_visible_in_snapshot(reached.xid, t.snapshot)
                else t.first > e.first end, false)), false)
    from outbox.lane l
   cross join (select max(first) as first from outbox.era where first <= coalesce(reached.id, first)) as e
    left join lateral (select p.tick from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
    left join outbox.tick t on t.id = p.tick
   where l.target = reached.target
$$;

-- What became of transaction `xid`, which drew `id`: committed, aborted, in progress; null when it is too long ago. Of an
-- earlier era, this server's transactions say nothing: what committed is in the log.
create function outbox.fate(xid xid8, id bigint) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select case when exists (select from outbox.log l where l.xid = fate.xid and l.id = fate.id) then 'committed'
              when fate.id >= (select max(first) from outbox.era) then pg_xact_status(fate.xid)
              when fate.id >= (select h.id from outbox.horizon h) then 'aborted' end
$$;

-- An attempt that may have been made in a time that the database has lost: what can't be found may have been there.
alter table outbox.receipt add adopted boolean not null default false;

-- What no lane has done: not passed, or parked to be tried by itself. Of what waits for its time, what could have had
-- it by now.
create function outbox.unapplied() returns setof outbox.log
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_bitmapscan = on set enable_seqscan = on
as $$
  select l.*
    from outbox.lane s
    left join lateral (select tick, upto, after, open from outbox.position p
                        where p.target = s.target and p.lane = s.lane order by seq desc limit 1) p on true
    join outbox.tick t on t.id = coalesce(p.tick, (select min(id) from outbox.tick))
    left join outbox.tick u on u.id = p.upto
    join outbox.log l on l.target = s.target and l.slot between s.slot_low and s.slot_high
                     and (l.id > t.floor or l.xid = any (array(select pg_snapshot_xip(t.snapshot)))
                          or l.id = any (p.open))
   where s.target <> 'clock'
     and (not outbox.shows(t.first, t.high, t.snapshot, l.xid, l.id) or l.id = any (p.open))
     and (l.id = any (p.open)
          or not coalesce(l.id <= p.after and outbox.shows(u.first, u.high, u.snapshot, l.xid, l.id), false))
     and (l.due is null or l.due <= outbox.now())
     and not exists (select from outbox.parked k where k.id = l.id)
  union all
  select l.*
    from outbox.parked k join outbox.log l on l.id = k.id
   where k.reason in ('retry', 'blocked') or k.reason = 'due' and k.retry_at <= outbox.now()
$$;

-- Whether a restored log's row was written here after all: by a transaction that is younger than transaction `since`,
-- in which the restore ended. (xmin is later than the xid where a savepoint wrote it.)
create function outbox.written_here(xmin xid, xid xid8, since xid) returns boolean
language sql stable
as $$
  select pg_catalog.age(xmin) < pg_catalog.age(since) and pg_catalog.age(xid::xid) < pg_catalog.age(since)
     and pg_catalog.age(xid::xid) >= pg_catalog.age(xmin)
$$;

-- Closes an era and opens the next one, in the caller's transaction; all of it or nothing. The caller has seen why it is
-- needed. Refused (OB012) while a lane is owned, and when the era that the caller `closes` is closed. `restored`: the xids of the log are another server's (a dump was restored), so that what was
-- written here since then has to be told from it. Returns the era's number, how many of the intents before it are not
-- done, and how many of these a participant that records its attempts has to look for.
--
-- Tick and intent ids go on at the next thousand million, and epochs at the next million: what was drawn in the lost
-- time is never drawn again, and nobody mistakes a position of that time for one of ours.
create function outbox.adopt(closes int, restored boolean, reason text, client text)
returns table (era int, intents bigint, doubts bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  gap   constant bigint := 1000000000;
  last  outbox.tick;
  place record;
  since xid;
  drawn bigint;
  bound bigint;
  top   numeric;
  o     bigint;
begin
  -- Against claims, and another one of us.
  lock table outbox.lane in share row exclusive mode;
  if (select max(e.number) from outbox.era e) <> closes then
    raise exception using errcode = 'OB011', message = 'somebody else has just adopted this log',
      hint = 'See outbox status.';
  end if;
  if exists (select from outbox.lane l where l.owner is not null and l.lease_until > outbox.now()) then
    raise exception using errcode = 'OB012', message = 'a worker owns a lane',
      hint = 'Stop the workers; a lease of one that died runs out by itself.';
  end if;
  -- Waits for those who are writing, and keeps others out: all that is in the log now is committed.
  lock table outbox.log in share mode;
  select * into strict place from outbox.here();
  select * into strict last from outbox.tick t order by t.id desc limit 1;
  select case when q.is_called then q.last_value else q.last_value - 1 end into drawn from outbox.log_id q;
  drawn := greatest(drawn, last.high, coalesce((select max(l.id) from outbox.log l), 0));
  bound := drawn + 1;
  if restored then
    -- The trigger is made after the rows were restored.
    select t.xmin into strict since from pg_trigger t
     where t.tgrelid = 'outbox.log'::regclass and t.tgname = 'log_append_only';
    select least(bound, min(l.id)) into bound from outbox.log l
     where l.id > last.floor and outbox.written_here(l.xmin, l.xid, since);
    if exists (select from outbox.log l where l.id > bound and not outbox.written_here(l.xmin, l.xid, since)) then
      raise exception using errcode = 'OB011',
        message = 'restored intents and intents that were written here are mixed',
        hint = 'Restore the dump into an empty database, and adopt it before applications write.';
    end if;
  end if;
  -- Above every xid of the log, in the numbers of the server that drew them.
  select greatest(pg_snapshot_xmax(last.snapshot)::text::numeric, coalesce(max(l.xid::text::numeric), 0) + 1,
                  case when restored then 0 else pg_snapshot_xmax(pg_current_snapshot())::text::numeric end)
    into top from outbox.log l where l.id > last.floor and l.id < bound;
  o := (last.id / gap + 1) * gap + 1;
  insert into outbox.tick (id, floor, low, high, snapshot, nonce, first) values
    (o - 1, last.low, bound - 1, bound - 1, (top || ':' || top || ':')::pg_snapshot,
     substr(replace(gen_random_uuid()::text, '-', ''), 1, 16), last.first),
    (o, bound - 1, bound - 1, bound - 1, '3:3:',
     substr(replace(gen_random_uuid()::text, '-', ''), 1, 16), bound);
  insert into outbox.era (number, opened, first, server, relation, database, timeline, reason, client)
  select max(e.number) + 1, o, bound, place.server, place.relation, place.database, place.timeline, adopt.reason,
         adopt.client from outbox.era e
  returning number into era;
  perform setval('outbox.log_id', (drawn / gap + 1) * gap - 1);
  perform outbox.add_partitions();
  update outbox.lane l
     set epoch = (n.epoch / 1000000 + 1) * 1000000, owner = null, place = null, lease_until = null, suspect = null,
         state = 'draining', reason = null, state_since = outbox.now()
    from (select max(e.epoch) as epoch from outbox.lane e) as n;
  -- What was not done may have been done in the lost time. Participants that record their attempts look, and ask.
  insert into outbox.receipt as r (id, target, slot, state, epoch, opened_at, adopted)
  select u.id, u.target, u.slot, 'open', 0, u.created_at, true from outbox.unapplied() u
   where u.target not in ('index', 'blob', 'saga') and not starts_with(u.target, 'actor.') and u.id < bound
  on conflict on constraint receipt_pkey do update set state = 'open', epoch = 0, adopted = true,
         opened_at = least(r.opened_at, excluded.opened_at)
   where r.state <> 'closed';
  get diagnostics doubts = row_count;
  select count(*) into intents from outbox.unapplied() u where u.id < bound;
  return next;
end $$;

revoke all on outbox.era from public;
revoke all on function outbox.here(), outbox.goes_on(),
  outbox.reached(xid8, text, bigint), outbox.fate(xid8, bigint), outbox.adopt(int, boolean, text, text), outbox.unapplied(), outbox.written_here(xid, xid8, xid)
  from public;
grant execute on function outbox.reached(xid8, text, bigint) to outbox_app, outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.fate(xid8, bigint) to outbox_app, outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.here(), outbox.goes_on() to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.adopt(int, boolean, text, text), outbox.unapplied() to outbox_operator;
grant select on outbox.era to outbox_worker, outbox_operator, outbox_reader;
-- A worker notes where it drains, and that nothing must go on; it opens no era.
grant update (database, halted) on outbox.era to outbox_worker;

reset role;
