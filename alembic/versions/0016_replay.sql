-- Replay: what actors were told is not repeated either.
--
-- The participant of a queue of actors is `actor.QUEUE` (0009), and outbox.repeat (0008) refused only a participant that
-- is called `actor`. Here it is as it was, but for that.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

-- Appends repetitions for an operation that is under way, in its transaction, in the order given. Each is either a copy
-- of the intent `ids` (from log or base), or, where `keys` says one, made of what `actions` and `payloads` say.
-- Returns their ids.
create or replace function outbox.repeat(operation bigint, epoch bigint, target text, ids bigint[], sinces bigint[],
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
  if repeat.target in ('clock', 'saga', 'actor') or starts_with(repeat.target, 'actor.')
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

reset role;
