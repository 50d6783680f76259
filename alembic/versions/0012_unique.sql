-- Unique messages, and schedules.
--
-- A message of an actor may have a key of its own, `unique_key` in its options. While one of a key is pending, no other
-- is sent. That is decided in the sender's transaction: it takes the key's row (outbox.unique_message) and writes its
-- intent at once, or it finds the message that has the key. Whether that one is pending is not written down anywhere: the
-- books that exist tell it (the lane's position, what is parked), so that nothing has to be done when a message is
-- acknowledged, and nothing is left behind when a worker, or a sender, is killed.
--
-- A schedule (outbox.cron) is a row too. Workers declare it, and each of them looks whether it is due; the one that
-- moves `slot` on, in the transaction that writes the message, has sent it. What a time slot is, is reckoned by them.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

--------------------------------------------------------------------------------------------- unique
-- Which message has a key. Rows of those that are done are removed by housekeeping.
create table outbox.unique_message (
  target     text        not null references outbox.participant,
  actor      text        not null,
  key        text        not null check (octet_length(key) between 1 and 512),
  id         bigint      not null,
  message_id text        not null,
  -- Until then the key is taken, whether the message is done or not.
  until      timestamptz not null,
  -- When housekeeping looks at it next.
  look_at    timestamptz not null,
  primary key (target, actor, key)
) with (fillfactor = 50);
create index unique_message_look on outbox.unique_message (look_at);

-- Whether a message waits, runs, or is to be retried. One that is given up, or was skipped, is not pending.
create function outbox.is_pending(id bigint) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
as $$
  select case
           when k.id is not null then k.reason not in ('poison', 'in_doubt', 'skipped')
           -- Its actor has acknowledged it; the lane's position may not know yet.
           when r.state = 'closed' then false
           else exists (
             select from outbox.log g
               left join outbox.lane l on l.target = g.target and g.slot between l.slot_low and l.slot_high
               left join lateral (select p.tick, p.upto, p.after, p.open from outbox.position p
                                   where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
               left join outbox.tick t on t.id = coalesce(p.tick, (select min(f.id) from outbox.tick f))
               left join outbox.tick u on u.id = p.upto
              where g.id = is_pending.id
                and (coalesce(g.id = any (p.open), false)
                     or not (coalesce(outbox.shows(t.first, t.high, t.snapshot, g.xid, g.id), false)
                             or coalesce(g.id <= p.after
                                         and outbox.shows(u.first, u.high, u.snapshot, g.xid, g.id), false))))
         end
    from (select) one
    left join outbox.parked k on k.id = is_pending.id
    left join outbox.receipt r on r.id = is_pending.id
$$;

-- Sends a message with a unique key, in the caller's transaction, unless one of its key is pending. Comes back: the one
-- that was sent, or the one that is there. `unique_key`, and `unique_for` in milliseconds, are among its options.
--
-- Waits where another transaction has sent one of the key and not ended: only that one's end tells. Under REPEATABLE READ
-- and SERIALIZABLE this ends with SQLSTATE 40001, as any row that another one has written. Where the message that is
-- there is committed, nobody waits.
create function outbox.send_unique(target text, action text, key text, payload jsonb, due timestamptz, headers jsonb,
                                   out xid bigint, out id bigint, out message_id text, out sent boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  whose text := payload ->> 'actor_name';
  mine  text := payload #>> '{options,unique_key}';
  span  interval := make_interval(secs => coalesce((payload #>> '{options,unique_for}')::float8, 0) / 1000);
  found outbox.unique_message;
begin
  if target is null or not starts_with(target, 'actor.') or whose is null or mine is null
     or action is null or action !~ '^send(\.[a-z0-9.]{1,40})?$' or payload ->> 'message_id' is null then
    raise exception using errcode = 'OB003',
      message = 'that is no message with a unique key',
      hint = 'Send it with actor.send_with_options(args=…, unique_key=…).';
  end if;
  sent := false;
  select u.* into found from outbox.unique_message u
   where u.target = send_unique.target and u.actor = whose and u.key = mine;
  if found.id is not null and (found.until > outbox.now() or outbox.is_pending(found.id)) then
    id := found.id;
    message_id := found.message_id;
    return;
  end if;
  loop
    -- Waits for whoever is about to take the key.
    select u.* into found from outbox.unique_message u
     where u.target = send_unique.target and u.actor = whose and u.key = mine for update;
    exit when found.id is not null;
    insert into outbox.unique_message (target, actor, key, id, message_id, until, look_at)
      values (send_unique.target, whose, mine, 0, '', '-infinity', outbox.now())
      on conflict do nothing;
  end loop;
  -- Looked at anew, now that nobody else can take it.
  if found.id > 0 and (found.until > outbox.now() or outbox.is_pending(found.id)) then
    id := found.id;
    message_id := found.message_id;
    return;
  end if;
  insert into outbox.log as l (target, action, key, payload, due, headers)
    values (send_unique.target, send_unique.action, send_unique.key, send_unique.payload, send_unique.due,
            send_unique.headers)
    returning l.xid::text::bigint, l.id into xid, id;
  message_id := payload ->> 'message_id';
  sent := true;
  update outbox.unique_message u
     set id = send_unique.id, message_id = send_unique.message_id, until = outbox.now() + span,
         look_at = outbox.now() + greatest(span, interval '1 minute')
   where u.target = send_unique.target and u.actor = whose and u.key = mine;
end $$;

-- Before an operator's retry of a message that was given up: it takes its key back. Comes back: why it can't, or null.
-- Its own, with one that is being sent right now never waited for.
create function outbox.retake_unique(id bigint) returns text
language plpgsql
set search_path = pg_catalog, pg_temp set lock_timeout = '1s' set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  wanted outbox.log;
  mine   text;
  found  outbox.unique_message;
begin
  select l.* into wanted from outbox.log l where l.id = retake_unique.id and starts_with(l.target, 'actor.');
  mine := wanted.payload #>> '{options,unique_key}';
  if mine is null or wanted.payload ->> 'actor_name' is null then
    return null;
  end if;
  loop
    select u.* into found from outbox.unique_message u
     where u.target = wanted.target and u.actor = wanted.payload ->> 'actor_name' and u.key = mine for update;
    exit when found.id is not null;
    insert into outbox.unique_message (target, actor, key, id, message_id, until, look_at)
      values (wanted.target, wanted.payload ->> 'actor_name', mine, wanted.id,
              coalesce(wanted.payload ->> 'message_id', ''), '-infinity', outbox.now())
      on conflict do nothing;
  end loop;
  if found.id <> wanted.id and outbox.is_pending(found.id) then
    return 'intent ' || found.id || ' has the same unique key and is pending: retry it when that is done, or skip it';
  end if;
  update outbox.unique_message u
     set id = wanted.id, message_id = coalesce(wanted.payload ->> 'message_id', ''),
         look_at = outbox.now() + interval '1 minute'
   where u.target = wanted.target and u.actor = wanted.payload ->> 'actor_name' and u.key = mine;
  return null;
exception
  when lock_not_available then
    return 'a message of its unique key is being sent right now: look again';
end $$;

-- Housekeeping: forgets the keys of messages that are done. One group; returns how many rows it looked at.
create function outbox.forget_unique(most int default 1000) returns int
language sql security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
as $$
  with look as materialized (
    select u.target, u.actor, u.key, u.until <= outbox.now() and not outbox.is_pending(u.id) as over
      from outbox.unique_message u where u.look_at <= outbox.now() order by u.look_at limit most
       for update skip locked
  ), gone as (
    delete from outbox.unique_message u using look k
     where k.over and (u.target, u.actor, u.key) = (k.target, k.actor, k.key)
  ), later as (
    update outbox.unique_message u set look_at = greatest(u.until, outbox.now() + interval '1 minute') from look k
     where not k.over and (u.target, u.actor, u.key) = (k.target, k.actor, k.key)
  )
  select count(*)::int from look
$$;

-- As in 0009, with one case more at the end.
create or replace function outbox.objection(action text, intent outbox.parked) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  holder outbox.lane;
  head   bigint;
begin
  if intent.reason = 'skipped' then
    return 'it was skipped: emit another intent instead';
  end if;
  if intent.reason = 'running' and exists (select from outbox.consumer c
                                            where c.target = intent.target and c.owner = intent.holder
                                              and c.lease_until > outbox.now()) then
    return 'it is running right now: look again when it has ended';
  end if;
  if (objection.action in ('applied', 'not_applied')) <> (intent.reason = 'in_doubt') then
    return case when intent.reason = 'in_doubt' then 'its effect may have happened: resolve it'
                else 'nothing about it is in doubt: retry or skip it' end;
  end if;
  if objection.action = 'retry' and intent.reason = 'blocked' then
    select min(p.id) into head from outbox.parked p
     where p.target = intent.target and p.key = intent.key and p.reason not in ('due', 'skipped');
    if head < intent.id then
      return 'it is blocked behind intent ' || head || ' of its key: decide about that one';
    end if;
  end if;
  select l.* into holder from outbox.lane l
   where l.target = intent.target and intent.slot between l.slot_low and l.slot_high;
  if intent.trying = holder.epoch and holder.owner is not null then
    -- An owner whose lease has run out is fenced off, as the next owner would do it: it can't record an outcome any
    -- more. Never waited for: an owner that records right now holds the lane's row.
    perform from outbox.lane l
      where l.target = holder.target and l.lane = holder.lane and l.epoch = holder.epoch and l.lease_until < outbox.now()
        for update skip locked;
    if not found then
      return 'it is being tried right now: look again';
    end if;
    update outbox.lane l set epoch = l.epoch + 1, owner = null, place = null, lease_until = null
     where l.target = holder.target and l.lane = holder.lane;
  end if;
  -- An attempt that was recorded and whose worker died: the next owner asks what became of it.
  if intent.reason <> 'in_doubt' and exists (select from outbox.receipt r where r.id = intent.id and r.state = 'open') then
    return 'what became of its last attempt is not known yet: its worker looks into that when it runs; look again';
  end if;
  -- In two phases (0003): the effect waits at the participant, and the next try lets it go.
  if objection.action = 'skip' and exists (select from outbox.receipt r where r.id = intent.id and r.state = 'prepared') then
    return 'its effect is prepared already, and can only be released: retry it';
  end if;
  if objection.action = 'retry' and intent.reason = 'poison' then
    return outbox.retake_unique(intent.id);
  end if;
  return null;
end $$;

---------------------------------------------------------------------------------------------- cron
-- The schedules that workers declare. Whoever moves `slot` on, in the transaction that sends the message, has sent it.
create table outbox.cron (
  name       text        primary key check (octet_length(name) between 1 and 200),
  expression text        not null,
  timezone   text        not null,
  missed     text        not null check (missed in ('skip', 'once', 'all')),
  target     text        not null references outbox.participant,
  -- The message as it is sent, but for its id and times, for `outbox.run_cron`; null: the intent's key is the id.
  action     text        not null,
  key        text,
  message    jsonb       not null,
  -- Tells one declaration of a name from another: only the one that is in force fires.
  version    text        not null,
  -- When the process began that declared it, and when somebody last did.
  since      timestamptz not null,
  seen_at    timestamptz not null,
  -- All time slots up to here are done with, and the next one.
  slot       timestamptz not null,
  next_at    timestamptz not null check (next_at > slot),
  -- The last message, and the slot that it was for; null: an operator's.
  last_id    bigint,
  last_message text,
  last_slot  timestamptz,
  last_at    timestamptz,
  check ((last_id is null) = (last_at is null))
) with (fillfactor = 50);

-- Sends the message of a schedule now, besides its times; who has, is told in its headers. Comes back: its intent, and
-- the message's id; `sent` is false if it has a unique key, and one of that is pending.
create function outbox.run_cron(name text, client text default '', out id bigint, out message_id text, out sent boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  wanted  outbox.cron;
  headers constant jsonb := jsonb_build_object('who', session_user, 'client', left(run_cron.client, 200));
  payload jsonb;
  drawn   text := gen_random_uuid();
begin
  select c.* into wanted from outbox.cron c where c.name = run_cron.name for update;
  if wanted.name is null then
    raise exception using errcode = 'OB020',
      message = 'there is no schedule of that name',
      hint = 'See outbox cron list.';
  end if;
  payload := wanted.message || jsonb_build_object(
    'message_id', drawn, 'message_timestamp', floor(extract(epoch from outbox.now()) * 1000)::bigint);
  if payload #>> '{options,unique_key}' is not null then
    select u.id, u.message_id, u.sent into id, message_id, sent
      from outbox.send_unique(wanted.target, wanted.action, coalesce(wanted.key, drawn), payload, null, headers) u;
  else
    insert into outbox.log as l (target, action, key, payload, headers)
      values (wanted.target, wanted.action, coalesce(wanted.key, drawn), payload, headers) returning l.id into id;
    message_id := drawn;
    sent := true;
  end if;
  update outbox.cron c
     set last_id = run_cron.id, last_message = run_cron.message_id, last_slot = null, last_at = outbox.now()
   where c.name = wanted.name;
end $$;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.unique_message, outbox.cron from public;
revoke all on function outbox.is_pending(bigint), outbox.retake_unique(bigint), outbox.forget_unique(int),
  outbox.send_unique(text, text, text, jsonb, timestamptz, jsonb), outbox.run_cron(text, text) from public;

grant select on outbox.unique_message, outbox.cron to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.is_pending(bigint) to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.send_unique(text, text, text, jsonb, timestamptz, jsonb) to outbox_app;
grant execute on function outbox.forget_unique(int) to outbox_worker;
grant insert, update on outbox.cron to outbox_actor;
grant delete on outbox.cron to outbox_operator;
grant execute on function outbox.run_cron(text, text) to outbox_operator;

reset role;
