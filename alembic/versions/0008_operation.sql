-- Operations: long work that an operator started (a replay, a scrub, a resilver, …), with how far it got.
--
-- The command that does it writes its progress down and may be killed anywhere; started again, it goes on from there.
-- One process at a time: it holds the row by a lease with an epoch, like the owner of a lane. Rows stay: they say who
-- did what, and when.
--
-- A replay and a repair never touch a participant: they append repetitions, intents that say once more what an earlier
-- one said (outbox.repeat), and the lanes apply them. A repetition names in its headers which intent it repeats:
--   {"replay": {"of": id, "since": id, "operation": id, "anew": true}}
-- `of` is its rank: among the intents of a key, it counts as if it stood where the repeated one stands. `since`: what
-- was known when it was written is all that had an id up to there; a lane looks for newer ones above it, and leaves
-- the repetition out if there is one. Without `since` it is about an event, which nothing overtakes.
-- `anew`: the repeated one was set aside for good, and this one stands for it.
--
-- SQLSTATEs of our own: OB015 a repetition is refused.
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

-- Which intent one with these headers repeats; null: none.
create function outbox.repeats(headers jsonb) returns bigint
language sql immutable parallel safe
as $$
  select case when headers #>> '{replay,of}' ~ '^[0-9]{1,18}$' then (headers #>> '{replay,of}')::bigint end
$$;

-- Every intent that base and log have, with its rank among those of its key. The last word about a key is the put or
-- delete of the highest rank that was applied: neither parked nor void.
create view outbox.word as
select l.target, l.slot, l.key, l.action, l.id, coalesce(outbox.repeats(l.headers), l.id) as rank, l.payload, l.headers,
       l.saga, l.xid, l.created_at, p.reason as parked, v.id is not null as void, false as based
  from outbox.log l
  left join outbox.parked p on p.id = l.id
  left join outbox.saga_void v on v.id = l.id
union all
select b.target, b.slot, b.key, 'put', b.id, coalesce(outbox.repeats(b.headers), b.id), b.payload, b.headers,
       null, null, b.created_at, null, false, true
  from outbox.base b
  -- What is carried and not dropped yet is in both.
 where b.id < (select h.id from outbox.horizon h);

-- Appends repetitions for an operation that is under way, in its transaction, in the order given. Each is either a copy
-- of the intent `ids` (from log or base), or, where `keys` says one, made of what `actions` and `payloads` say.
-- Returns their ids.
create function outbox.repeat(operation bigint, epoch bigint, target text, ids bigint[], sinces bigint[],
                              anew boolean default false, keys text[] default null, actions text[] default null,
                              payloads jsonb[] default null)
returns setof bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  missing bigint;
begin
  perform from outbox.operation o
    where o.id = repeat.operation and o.epoch = repeat.epoch and o.state = 'running' for share;
  if not found then
    raise exception using errcode = 'OB015',
      message = 'operation ' || coalesce(repeat.operation::text, 'null') || ' is not under way',
      hint = 'Begin one, or resume it: it is what records who repeats what.';
  end if;
  if repeat.target in ('clock', 'saga', 'actor')
     or not exists (select from outbox.participant p where p.target = repeat.target) then
    raise exception using errcode = 'OB015',
      message = 'intents of ' || quote_literal(repeat.target) || ' are not repeated',
      hint = 'Repeat those of a participant in outbox.participant; sagas and actors have acted already.';
  end if;
  -- In the base a key may be there by a repetition of what was dropped: its id is the repetition's.
  select i.id into missing from unnest(repeat.ids, repeat.keys) as i (id, key)
   where i.key is null
     and not exists (select from outbox.log l where l.id = i.id and l.target = repeat.target)
     and not exists (select from outbox.base b where b.id = i.id and b.target = repeat.target)
   limit 1;
  if found then
    raise exception using errcode = 'OB015',
      message = 'intent ' || coalesce(missing::text, 'null') || ' is not in the log of ' || repeat.target,
      hint = 'It was dropped meanwhile, and something newer says what its key is now.';
  end if;
  return query
    insert into outbox.log (target, action, key, payload, headers)
    select repeat.target, coalesce(i.action, l.action, 'put'), coalesce(i.key, l.key, b.key),
           coalesce(i.payload, l.payload, b.payload, '{}'),
           case when jsonb_typeof(coalesce(l.headers, b.headers)) = 'object' then coalesce(l.headers, b.headers)
                else '{}' end
           || jsonb_build_object('replay', jsonb_strip_nulls(jsonb_build_object(
                'of', coalesce(outbox.repeats(coalesce(l.headers, b.headers)), i.id), 'since', i.since,
                'operation', repeat.operation, 'anew', case when repeat.anew then true end)))
      from unnest(repeat.ids, repeat.sinces, repeat.keys, repeat.actions, repeat.payloads)
           with ordinality as i (id, since, key, action, payload, place)
      left join outbox.log l on l.id = i.id
      left join outbox.base b on l.id is null and b.id = i.id and b.target = repeat.target
     order by i.place
    returning id;
end $$;

revoke all on outbox.word from public;
revoke all on function outbox.repeats(jsonb) from public;
revoke all on function outbox.repeat(bigint, bigint, text, bigint[], bigint[], boolean, text[], text[], jsonb[])
  from public;
grant select on outbox.word to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.repeats(jsonb) to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.repeat(bigint, bigint, text, bigint[], bigint[], boolean, text[], text[], jsonb[])
  to outbox_operator;
revoke all on outbox.operation from public;
grant select on outbox.operation to outbox_worker, outbox_operator, outbox_reader;
grant insert (kind, request, progress, client, owner, place, lease_until),
      update (progress, result, state, error, epoch, owner, place, lease_until, ended_at)
   on outbox.operation to outbox_operator, outbox_worker;

reset role;
