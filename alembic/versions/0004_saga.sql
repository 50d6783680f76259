-- Sagas: business operations over several participants, each completed, or compensated, or shown stuck.
--
-- Life of a saga. An application starts it with an intent for the participant `saga`, in its own transaction; the
-- intent's key is the saga's id. The engine (workers.engine) reads that lane like any other. It keeps one row for the
-- saga and one for each step, and changes them only for an intent that it has read: `start`, `outcome`, `timer`,
-- `signal`, `cancel`, and what operators ask for. Whatever follows (more intents, timers, what a function step wrote) is in the
-- same transaction as the change.
--
-- An intent of a step carries the saga's id in outbox.log.saga. When its participant's worker knows what became of it,
-- it writes an `outcome` for the engine (outbox.saga_report) in the transaction that moves its position. An intent
-- that the engine has recalled is in outbox.saga_void: workers don't apply it, and report that.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

do $$
begin
  -- What the engine connects as: a worker that may also append to the log, like an application. Workers of
  -- participants may not: one that is taken over must not be able to send mail.
  if not exists (select from pg_catalog.pg_roles where rolname = 'outbox_saga') then
    begin
      create role outbox_saga nologin;
    exception
      when duplicate_object or unique_violation then null;
    end;
  end if;
  grant outbox_worker, outbox_app to outbox_saga;
exception
  -- Two databases of one cluster may be migrated at the same time.
  when unique_violation then null;
end $$;

grant usage on schema outbox to outbox_saga;

set local role outbox_owner;

----------------------------------------------------------------------------------------------- sagas
-- The steps of each definition that an engine was started with, for people and for the check before a deployment.
create table outbox.saga_plan (
  name    text        not null,
  version int         not null,
  shape   text        not null,
  nodes   jsonb       not null,
  seen_at timestamptz not null default outbox.now(),
  primary key (name, version, shape)
);

create table outbox.saga (
  id         uuid        primary key,
  name       text        not null,
  version    int         not null,
  -- Digest of the steps that it was started with: code with other steps under the same version is refused.
  shape      text        not null,
  -- What the application knows it by; unique for each name, because the id is made of both.
  key        text,
  state      text        not null check (state in ('waiting', 'running', 'completing', 'compensating', 'stuck',
                                                   'completed', 'compensated')),
  decision   text        not null check (decision in ('open', 'commit', 'abort')),
  -- Rises with each change: a change is written only over the one that it was computed from.
  revision   int         not null default 1,
  input      jsonb       not null,
  signals    text[]      not null default '{}',
  reason     text        not null default '',
  -- Of a child: whom to tell.
  parent     uuid,
  parent_intent bigint,
  started_at timestamptz not null default outbox.now(),
  ended_at   timestamptz,
  check ((state in ('completed', 'compensated')) = (ended_at is not null)),
  check (case state when 'waiting' then decision = 'open'
                    when 'running' then decision = 'open'
                    when 'completing' then decision = 'commit'
                    when 'completed' then decision = 'commit'
                    when 'compensating' then decision = 'abort'
                    when 'compensated' then decision = 'abort'
                    else true end),
  check ((parent is null) = (parent_intent is null))
);
create index saga_open on outbox.saga (name, started_at) where ended_at is null;
create index saga_started on outbox.saga (started_at);
create index saga_parent on outbox.saga (parent) where parent is not null;

create table outbox.saga_step (
  saga       uuid        not null references outbox.saga on delete cascade,
  step       text        not null,
  -- Its place in the definition.
  place      smallint    not null,
  state      text        not null check (state in ('pending', 'running', 'recalled', 'done', 'failed', 'undoing',
                                                   'undone', 'stuck', 'skipped')),
  -- (round, tries) names one try: each action and each compensation is a round.
  round      int         not null default 0,
  tries      int         not null default 0,
  -- The intent of the newest try: only its outcome counts.
  intent     bigint,
  result     jsonb       check (pg_catalog.octet_length(result::text) <= 65536),
  error      text        not null default '',
  began_at   timestamptz,
  ended_at   timestamptz,
  primary key (saga, step)
);

---------------------------------------------------------------------------------------------- timers
-- What is to happen at a time. The engine turns what is due into intents (outbox/sql/saga_wake.sql).
create table outbox.saga_timer (
  saga  uuid        not null references outbox.saga on delete cascade,
  step  text        not null,
  what  text        not null check (what in ('timeout', 'retry')),
  round int         not null,
  tries int         not null,
  slot  smallint    not null,
  due   timestamptz not null,
  primary key (saga, step, what)
);
create index saga_timer_due on outbox.saga_timer (due);

-- Intents of sagas that must not be applied (any more): recalled by the engine, or reported as failed. Kept, so that
-- a participant that is rebuilt from the log doesn't apply them either.
create table outbox.saga_void (
  id bigint      primary key,
  -- Whether its worker has said so: until then it may be applied already, by an owner that died of it.
  answered boolean not null default false,
  at timestamptz not null default outbox.now()
);

-- What happened to a saga beyond the plain way: failures, signals, timers, refusals, and who did what.
create table outbox.saga_event (
  id     bigint      generated always as identity primary key,
  saga   uuid        not null references outbox.saga on delete cascade,
  at     timestamptz not null default outbox.now(),
  step   text,
  what   text        not null,
  detail text        not null default '',
  who    text        not null default ''
);
create index saga_event_saga on outbox.saga_event (saga, id);

----------------------------------------------------------------------------------------------- locks
-- Semantic locks: names that a saga holds from before its first step until it has ended. Who waits is in the same
-- table, in the order of `since`; the first one of a name holds it.
create table outbox.saga_lock (
  name  text        not null check (pg_catalog.octet_length(name) between 1 and 512),
  saga  uuid        not null references outbox.saga on delete cascade,
  since bigint      not null generated always as identity,
  held  boolean     not null,
  primary key (name, saga)
);
create unique index saga_lock_held on outbox.saga_lock (name) where held;
create index saga_lock_saga on outbox.saga_lock (saga);

------------------------------------------------------------------------------------------- reporting
-- Tells the engine what became of intents of sagas: appends one `outcome` for each id that belongs to one. What was
-- not applied becomes void. Called by workers.reader in the transaction that records the same for itself.
create function outbox.saga_report(ids bigint[], verdicts text[], errors text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  insert into outbox.saga_void (id, answered)
    select r.id, true from unnest(ids, verdicts) as r (id, verdict)
      join outbox.log l on l.id = r.id
     where l.saga is not null and r.verdict <> 'applied'
    on conflict (id) do update set answered = true;
  insert into outbox.log (target, action, key, payload)
    select 'saga', 'outcome', l.saga::text,
           jsonb_build_object('intent', l.id, 'verdict', r.verdict, 'error', left(r.error, 500))
      from unnest(ids, verdicts, errors) with ordinality as r (id, verdict, error, place)
      join outbox.log l on l.id = r.id
     where l.saga is not null
     order by r.place;
$$;

-- An operator's decision about a parked intent of a saga is an outcome too.
create function outbox.saga_decided() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform outbox.saga_report(array[new.intent],
    array[case when new.action = 'applied' then 'applied' when new.reason = 'in_doubt' then 'unknown' else 'failed' end],
    array[case when new.action = 'applied' then '' else 'skipped by an operator' end]);
  return null;
end $$;
create trigger audit_saga after insert on outbox.audit
  for each row when (new.action in ('skip', 'applied')) execute function outbox.saga_decided();

-- What an operator asks of a saga: cancel it; retry or skip a step that is stuck; or resolve one, by saying whether it
-- has happened. The engine decides; what it refuses, and who asked, is in outbox.saga_event. Returns the intent's id.
create function outbox.saga_ask(saga uuid, action text, step text default null, happened boolean default null,
                                note text default '')
returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  drawn bigint;
begin
  if saga_ask.action is null or saga_ask.action not in ('cancel', 'retry', 'skip', 'resolve') then
    raise exception using errcode = 'OB003',
      message = 'there is no such request',
      hint = 'Ask for cancel, retry, skip or resolve.';
  end if;
  if not exists (select from outbox.saga s where s.id = saga_ask.saga) then
    raise exception using errcode = 'OB003',
      message = 'there is no saga ' || saga_ask.saga,
      hint = 'See outbox.saga, or outbox saga list.';
  end if;
  if saga_ask.action <> 'cancel'
     and not exists (select from outbox.saga_step t where t.saga = saga_ask.saga and t.step = saga_ask.step) then
    raise exception using errcode = 'OB003',
      message = 'the saga has no such step',
      hint = 'See outbox.saga_step, or outbox saga show.';
  end if;
  if saga_ask.action = 'resolve' and saga_ask.happened is null then
    raise exception using errcode = 'OB003',
      message = 'a resolution says whether the step has happened',
      hint = 'Give happened => true or false.';
  end if;
  if length(saga_ask.note) > 1000 then
    raise exception using errcode = 'OB003',
      message = 'the note is longer than 1000 characters',
      hint = 'Write a shorter one.';
  end if;
  insert into outbox.log (target, action, key, payload)
    values ('saga', saga_ask.action, saga_ask.saga::text,
            jsonb_strip_nulls(jsonb_build_object('step', saga_ask.step, 'happened', saga_ask.happened,
                                                 'reason', saga_ask.note, 'who', session_user)))
    returning id into drawn;
  return drawn;
end $$;

-- Where a saga is: for applications, which may not read the tables. Null before the engine has read its start.
create function outbox.saga_state(saga uuid) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select s.state from outbox.saga s where s.id = saga_state.saga
$$;

select outbox.register('saga');

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.saga, outbox.saga_step, outbox.saga_timer, outbox.saga_void, outbox.saga_event, outbox.saga_lock,
  outbox.saga_plan from public;
revoke all on function outbox.saga_report(bigint[], text[], text[]) from public;
revoke all on function outbox.saga_decided() from public;
revoke all on function outbox.saga_state(uuid) from public;

revoke all on function outbox.saga_ask(uuid, text, text, boolean, text) from public;

grant select on outbox.saga, outbox.saga_step, outbox.saga_timer, outbox.saga_void, outbox.saga_event,
  outbox.saga_lock, outbox.saga_plan to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.saga_state(uuid) to outbox_app, outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.saga_ask(uuid, text, text, boolean, text) to outbox_operator;
grant execute on function outbox.saga_report(bigint[], text[], text[]) to outbox_worker;

grant insert, update, delete on outbox.saga, outbox.saga_step, outbox.saga_timer, outbox.saga_lock to outbox_saga;
grant insert on outbox.saga_void, outbox.saga_event, outbox.saga_plan to outbox_saga;
-- What was recalled and is done all the same.
grant delete on outbox.saga_void to outbox_saga;

reset role;
