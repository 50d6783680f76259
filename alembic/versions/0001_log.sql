-- The schema `outbox`: a log of intents, and what is known about how far it was applied.
--
-- Life of an intent. An application inserts it into outbox.log inside its own transaction (by the session
-- hook, or by calling outbox.emit). Nothing ever updates or deletes that row; partitions are dropped whole.
-- The clock stores ticks (outbox.tick): a tick is a snapshot, and what lies between two ticks is a batch of
-- whole transactions. One owner at a time drains each lane (outbox.lane); it appends how far it is to
-- outbox.position, sets aside what failed in outbox.parked, and keeps proofs of effects that can't be looked
-- up later in outbox.receipt.
--
-- Only small tables are ever updated, and none of them at the rate of the intents.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.
--
-- SQLSTATEs of our own: OB001 the log is append-only; OB002 unknown target; OB003 intent refused.

------------------------------------------------------------------------------------------------ roles
-- Cluster-wide, without login: grant them to the users that applications and workers connect as.
do $$
declare
  name text;
begin
  foreach name in array array['outbox_owner', 'outbox_app', 'outbox_worker', 'outbox_operator', 'outbox_reader']
  loop
    if not exists (select from pg_catalog.pg_roles where rolname = name) then
      begin
        execute 'create role ' || pg_catalog.quote_ident(name) || ' nologin';
      exception
        -- Two databases of one cluster may be migrated at the same time.
        when duplicate_object or unique_violation then null;
      end;
    end if;
  end loop;
  if not pg_catalog.pg_has_role(current_user, 'outbox_owner', 'member') then
    execute 'grant outbox_owner to ' || pg_catalog.quote_ident(current_user);
  end if;
end $$;

alter schema outbox owner to outbox_owner;
alter table outbox.alembic_version owner to outbox_owner;
revoke all on schema outbox from public;
grant usage on schema outbox to outbox_app, outbox_worker, outbox_operator, outbox_reader;

set local role outbox_owner;
-- Nothing is for PUBLIC, neither what follows nor what later migrations add.
alter default privileges in schema outbox revoke all on tables from public;
alter default privileges revoke execute on functions from public;

------------------------------------------------------------------------------------------------ time
-- The only clock that leases and due times are compared with. Tests set it, so that they needn't sleep.
create function outbox.now() returns timestamptz
language sql stable parallel safe
as $$
  select coalesce(nullif(pg_catalog.current_setting('outbox.fake_now', true), '')::timestamptz,
                  pg_catalog.clock_timestamp())
$$;

-------------------------------------------------------------------------------------------- identity
-- One row: which log this is. A position carries it, so that a participant notices another database.
create table outbox.identity (
  only_row boolean primary key default true check (only_row),
  log      text not null check (log ~ '^[0-9a-f]{16}$'),
  made_at  timestamptz not null default pg_catalog.clock_timestamp()
);
insert into outbox.identity (log)
values (pg_catalog.substr(pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), 1, 16));

------------------------------------------------------------------------------------------------- log
create sequence outbox.log_id as bigint cache 1;

-- Which of 16384 slots a key falls into. A lane is a range of slots. Portable: the same in every database.
create function outbox.slot(key text) returns smallint
language sql immutable strict parallel safe
as $$
  select (('x' || pg_catalog.substr(pg_catalog.md5(key), 1, 4))::bit(16)::int & 16383)::smallint
$$;

-- Defaults are evaluated in the order of the columns: a transaction has its xid before it draws an id.
-- The reading of batches depends on that (docs/explanation/log-and-ticks.md).
create table outbox.log (
  xid        xid8        not null default pg_catalog.pg_current_xact_id(),
  id         bigint      not null default pg_catalog.nextval('outbox.log_id'),
  -- outbox.slot(key), spelled out: a call would be inlined anew for each INSERT.
  slot       smallint    not null generated always as
             ((('x' || pg_catalog.substr(pg_catalog.md5(key), 1, 4))::bit(16)::int & 16383)::smallint) stored,
  target     text        not null,
  action     text        not null,
  key        text        not null,
  payload    jsonb       not null,
  headers    jsonb,
  saga       uuid,
  due        timestamptz,
  created_at timestamptz not null default pg_catalog.clock_timestamp(),
  primary key (id),
  constraint log_key_size     check (pg_catalog.octet_length(key) between 1 and 512),
  constraint log_payload_size check (pg_catalog.octet_length(payload::text) <= 65536)
) partition by range (id);
alter sequence outbox.log_id owned by outbox.log.id;
-- For stragglers: rows of transactions that were still running at a tick. With id, so that one transaction of
-- a million rows is read page by page in order.
create index log_xid on outbox.log (xid, id);

create function outbox.refuse_change() returns trigger
language plpgsql
as $$
begin
  raise exception using
    errcode = 'OB001',
    message = 'the log is append-only: ' || tg_op || ' on ' || tg_table_name || ' is refused',
    hint = 'To undo an effect, emit another intent.';
end $$;

create trigger log_append_only before update or delete on outbox.log
  for each row execute function outbox.refuse_change();
create trigger log_no_truncate before truncate on outbox.log
  for each statement execute function outbox.refuse_change();

-- Partitions of a million ids, made `ahead` of the sequence. Attaching, unlike CREATE … PARTITION OF, doesn't
-- lock out writers. Returns how many it made.
create function outbox.add_partitions(ahead int default 16) returns int
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  size  constant bigint := 1000000;
  first bigint;
  made  int := 0;
  name  text;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('outbox.add_partitions', 0)) then
    return 0;
  end if;
  select case when is_called then last_value else last_value - 1 end / size into first from outbox.log_id;
  for n in first .. first + ahead - 1 loop
    name := 'log_' || lpad(n::text, 6, '0');
    if to_regclass('outbox.' || name) is null then
      execute 'create table outbox.' || name || ' (like outbox.log including all)';
      execute 'create trigger log_no_truncate before truncate on outbox.' || name
           || ' for each statement execute function outbox.refuse_change()';
      execute 'alter table outbox.log attach partition outbox.' || name
           || ' for values from (' || greatest(n * size, 1) || ') to (' || (n + 1) * size || ')';
      made := made + 1;
    end if;
  end loop;
  return made;
end $$;
select outbox.add_partitions();

----------------------------------------------------------------------------------------------- ticks
-- tick(k) is a stored snapshot. What is visible in snapshot k and not in snapshot j is batch(j -> k).
create table outbox.tick (
  id       bigint      primary key,
  floor    bigint      not null,  -- the previous tick's low: kept here, so that ticks can be thinned
  low      bigint      not null,  -- the sequence, read before this tick's transaction had an xid
  high     bigint      not null,  -- the sequence, read after the snapshot
  snapshot pg_snapshot not null,
  nonce    text        not null check (nonce ~ '^[0-9a-f]{16}$'),
  at       timestamptz not null default outbox.now(),
  check (floor <= low and low <= high)
);
insert into outbox.tick (id, floor, low, high, snapshot, nonce)
select 1, 0, 0, 0, pg_catalog.pg_current_snapshot(),
       pg_catalog.substr(pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), 1, 16);

--------------------------------------------------------------------------------- participants, lanes
create table outbox.participant (
  target        text        primary key check (target ~ '^[a-z][a-z0-9_.-]{0,62}$'),
  lanes         smallint    not null check (lanes between 1 and 256),
  registered_at timestamptz not null default outbox.now()
);

create table outbox.lane (
  target        text        not null references outbox.participant,
  lane          smallint    not null check (lane >= 0),
  slot_low      smallint    not null,
  slot_high     smallint    not null check (slot_low <= slot_high),
  -- The lease. Every new owner gets a higher epoch; every write of an owner requires its epoch to be current.
  epoch         bigint      not null default 0,
  owner         uuid,
  place         text,
  lease_until   timestamptz,
  -- How often an owner died without getting anywhere: the next one takes smaller batches, and notes the first
  -- intent of each before it is applied. deaths_seq is where the position was at the last claim.
  deaths        smallint    not null default 0,
  deaths_seq    bigint      not null default 0,
  suspect       bigint,
  -- For people: what the lane is doing when it isn't draining.
  state         text        not null default 'draining' check (state in ('draining', 'waiting', 'stopped')),
  reason        text,
  state_since   timestamptz not null default outbox.now(),
  primary key (target, lane),
  check ((owner is null) = (lease_until is null)),
  check ((state = 'draining') = (reason is null))
) with (fillfactor = 50);

-- Where the lanes are. Appended and thinned, never updated: an open transaction somewhere must not make
-- the hot path wade through dead versions of one row.
create table outbox.position (
  seq    bigint      generated always as identity primary key,
  target text        not null,
  lane   smallint    not null,
  epoch  bigint      not null,
  tick   bigint      not null,
  upto   bigint      not null default 0,
  after  bigint      not null default 0,
  at     timestamptz not null default outbox.now(),
  check ((upto = 0) = (after = 0)),
  foreign key (target, lane) references outbox.lane
);
create index position_lane on outbox.position (target, lane, seq);

-- Makes a participant known, with its lanes. Returns false if it was known already.
create function outbox.register(target text, lanes int default 1) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into outbox.participant (target, lanes) values (register.target, register.lanes)
    on conflict do nothing;
  if not found then
    return false;
  end if;
  insert into outbox.lane (target, lane, slot_low, slot_high)
    select register.target, n, n * 16384 / register.lanes, (n + 1) * 16384 / register.lanes - 1
      from generate_series(0, register.lanes - 1) as n;
  return true;
end $$;
-- `clock` is no participant that intents are for: it is the lease of the process that takes the ticks.
select outbox.register(name) from unnest(array['clock', 'index', 'blob', 'mail']) as name;

---------------------------------------------------------------------------------------------- parked
-- Intents set aside, each with its reason. Rows of one key are worked off in the order of their id.
create table outbox.parked (
  id        bigint      primary key,
  target    text        not null,
  slot      smallint    not null,
  key       text        not null,
  reason    text        not null check (reason in ('retry', 'poison', 'in_doubt', 'blocked', 'due')),
  attempts  int         not null default 0,
  -- How often in a row it was tried without an outcome: its worker died of it, perhaps.
  deaths    int         not null default 0,
  retry_at  timestamptz,
  error     text        not null default '',
  parked_at timestamptz not null default outbox.now(),
  -- Only what waits for a time has one.
  check ((reason in ('retry', 'due')) = (retry_at is not null))
);
create index parked_key on outbox.parked (target, key, id);
create index parked_due on outbox.parked (target, retry_at) where retry_at is not null;

-------------------------------------------------------------------------------------------- receipts
-- For participants whose effects can't be made twice harmlessly: `open` is written before an attempt,
-- `closed` with its outcome, `partial` when a part of it is known to be done and the rest is to be retried.
-- What a dead owner left open is in doubt, and is probed by the next one.
create table outbox.receipt (
  id        bigint      primary key,
  target    text        not null,
  slot      smallint    not null,
  state     text        not null check (state in ('open', 'partial', 'closed')),
  attempts  int         not null default 1,
  epoch     bigint      not null,
  evidence  jsonb       not null default '{}',
  opened_at timestamptz not null default outbox.now(),
  closed_at timestamptz,
  check ((state = 'closed') = (closed_at is not null))
);
create index receipt_open on outbox.receipt (target, slot) where state = 'open';

---------------------------------------------------------------------------------------- for everyone
-- Writes one intent in the caller's transaction, from any client and from triggers. Returns its id.
create function outbox.emit(target text, action text, key text, payload jsonb default '{}',
                            due timestamptz default null, headers jsonb default null)
returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  drawn bigint;
begin
  if target is null or action is null or key is null or payload is null then
    raise exception using errcode = 'OB003',
      message = 'target, action, key and payload must not be null',
      hint = 'Use ''{}'' for an intent without a payload.';
  end if;
  if target = 'clock' or not exists (select from outbox.participant p where p.target = emit.target) then
    raise exception using errcode = 'OB002',
      message = 'no participant ' || quote_literal(target) || ' is registered',
      hint = 'Register it with select outbox.register(name), or use one of those in outbox.participant.';
  end if;
  if action !~ '^[a-z][a-z0-9_.-]{0,62}$' then
    raise exception using errcode = 'OB003',
      message = 'the action is not a name',
      hint = 'Use lower-case letters, digits, _, . and -, at most 63.';
  end if;
  if octet_length(key) not between 1 and 512 then
    raise exception using errcode = 'OB003',
      message = 'the key must have 1 to 512 bytes',
      hint = 'Use a shorter identity, such as a hash.';
  end if;
  if octet_length(payload::text) > 65536 then
    raise exception using errcode = 'OB003',
      message = 'the payload has ' || octet_length(payload::text) || ' bytes, the limit is 65536',
      hint = 'Stage the large part as a blob, and name the blob in the payload.';
  end if;
  insert into outbox.log (target, action, key, payload, due, headers)
    values (target, action, key, payload, due, headers) returning id into drawn;
  return drawn;
end $$;

-- Whether every lane of `target` has passed the commit of transaction `xid` (for read-your-writes).
create function outbox.reached(xid xid8, target text) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(bool_and(coalesce(pg_visible_in_snapshot(reached.xid, t.snapshot), false)), false)
    from outbox.lane l
    left join lateral (select p.tick from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
    left join outbox.tick t on t.id = p.tick
   where l.target = reached.target
$$;

---------------------------------------------------------------------------------------------- grants
revoke all on all tables in schema outbox from public;
revoke all on all sequences in schema outbox from public;
revoke all on all functions in schema outbox from public;

grant execute on function outbox.now() to outbox_app, outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.slot(text) to outbox_app, outbox_worker, outbox_operator, outbox_reader;

-- The application appends, and can't choose an xid or an id.
grant insert (target, action, key, payload, headers, saga, due) on outbox.log to outbox_app;
grant select (xid, id) on outbox.log to outbox_app;
grant usage on sequence outbox.log_id to outbox_app;
grant select on outbox.identity, outbox.participant, outbox.alembic_version to outbox_app;
grant execute on function outbox.emit(text, text, text, jsonb, timestamptz, jsonb) to outbox_app;
grant execute on function outbox.reached(xid8, text) to outbox_app, outbox_worker, outbox_operator, outbox_reader;

-- Workers read the log and keep the books.
grant select on all tables in schema outbox to outbox_worker, outbox_operator, outbox_reader;
grant select on all sequences in schema outbox to outbox_worker, outbox_operator, outbox_reader;
grant insert, delete on outbox.tick, outbox.position to outbox_worker;
grant update (epoch, owner, place, lease_until, deaths, deaths_seq, suspect, state, reason, state_since)
  on outbox.lane to outbox_worker;
grant insert, update, delete on outbox.parked, outbox.receipt to outbox_worker;
grant execute on function outbox.add_partitions(int) to outbox_worker;

grant update (reason, retry_at, attempts) on outbox.parked to outbox_operator;
grant execute on function outbox.register(text, int) to outbox_operator;

reset role;
