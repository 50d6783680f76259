-- The base: what the dropped part of the log still means.
--
-- Partitions of the log are dropped whole once they are old enough and every lane has passed them. Before that, the
-- last put of each live key is carried into outbox.base, so that base + log can always rebuild a participant. The
-- two don't overlap: the base is about ids below outbox.horizon, the log has the ids from there on.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

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

-- One row: up to where the log was dropped. A position at an earlier tick than `tick` can't go on in the log (the
-- first tick, where a participant begins that holds nothing, can: by way of the base).
create table outbox.horizon (
  only_row boolean primary key default true check (only_row),
  id       bigint  not null default 1,  -- the first id that is still in the log
  tick     bigint  not null default 1
);
insert into outbox.horizon default values;

revoke all on outbox.base, outbox.horizon from public;
grant select on outbox.base, outbox.horizon to outbox_app, outbox_worker, outbox_operator, outbox_reader;

reset role;
