-- Operations: long work that an operator started (a replay, a scrub, a resilver, …), with how far it got.
--
-- The command that does it writes its progress down and may be killed anywhere; started again, it goes on from there.
-- One process at a time: it holds the row by a lease with an epoch, like the owner of a lane. Rows stay: they say who
-- did what, and when.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

create table outbox.operation (
  id          bigint      generated always as identity primary key,
  kind        text        not null check (kind ~ '^[a-z][a-z_]{0,31}$'),
  -- What was asked for, in the words of the command; no payloads.
  request     jsonb       not null default '{}',
  -- Where it would go on; its form is the kind's own.
  progress    jsonb       not null default '{}',
  -- What it found or did in the end.
  result      jsonb,
  state       text        not null default 'running' check (state in ('running', 'done', 'failed', 'abandoned')),
  error       text        not null default '',
  -- The database's user; and what the command said about the system's user and host, which nobody has checked.
  who         text        not null default session_user,
  client      text        not null default '',
  epoch       bigint      not null default 1,
  owner       uuid,
  place       text,
  lease_until timestamptz,
  started_at  timestamptz not null default outbox.now(),
  ended_at    timestamptz,
  check ((state = 'running') = (ended_at is null)),
  check ((owner is null) = (lease_until is null)),
  check (state = 'running' or owner is null)
);
create index operation_running on outbox.operation (kind) where state = 'running';

revoke all on outbox.operation from public;
grant select on outbox.operation to outbox_worker, outbox_operator, outbox_reader;
grant insert (kind, request, progress, client, owner, place, lease_until),
      update (progress, result, state, error, epoch, owner, place, lease_until, ended_at)
   on outbox.operation to outbox_operator, outbox_worker;

reset role;
