-- Actors: messages of dramatiq, delivered from the log.
--
-- Life of a message. `actor.send()` writes an intent for the participant `actor.QUEUE`, in the application's
-- transaction or in one of its own. A worker process is a *consumer* of some queues; the lanes of a queue are shared out
-- among its consumers. The owner of a lane reads a page of the log and *claims* it: it appends a position behind the
-- page, with the ids that are not done yet in `open`; only then are they handed to dramatiq's threads. Acknowledgements
-- come in any order, and each leaves `open` with the next position, a few milliseconds later: no row is updated for a
-- message that goes well. One that fails is parked like any intent.
--
-- What a dead owner left open is parked by the next one, as something that may have killed it. A message that is in
-- hand and has a row of its own (a retry; or it was running when its lane went to another consumer) is parked as
-- `running`, and belongs to its holder until that has recorded what became of it.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

do $$
begin
  -- What a worker of actors connects as: it keeps the books of its lanes, and its actors write intents.
  if not exists (select from pg_catalog.pg_roles where rolname = 'outbox_actor') then
    begin
      create role outbox_actor nologin;
    exception
      when duplicate_object or unique_violation then null;
    end;
  end if;
  grant outbox_worker, outbox_app to outbox_actor;
exception
  -- Two databases of one cluster may be migrated at the same time.
  when unique_violation then null;
end $$;

grant usage on schema outbox to outbox_actor;

set local role outbox_owner;

---------------------------------------------------------------------------------------------- parked
-- Whose hands a running message is in. Means nothing for other reasons.
alter table outbox.parked add column holder uuid;
alter table outbox.parked drop constraint parked_reason_check;
alter table outbox.parked add constraint parked_reason_check
  check (reason in ('retry', 'poison', 'in_doubt', 'blocked', 'due', 'skipped', 'running'));
alter table outbox.parked add constraint parked_running check (reason <> 'running' or holder is not null);
create index parked_running on outbox.parked (target) where reason = 'running';

------------------------------------------------------------------------------------------- consumers
-- The processes that take part in a queue. Each has its share of the lanes; one whose threads are all taken for
-- longer (`busy`) leaves its share to the others.
create table outbox.consumer (
  target      text        not null references outbox.participant,
  owner       uuid        not null,
  place       text        not null,
  busy        boolean     not null default false,
  lease_until timestamptz not null,
  primary key (target, owner)
);

---------------------------------------------------------------------------------------------- queues
-- Makes a queue known, with its lanes. Returns false if it was known already; its lanes stay as they are then.
create function outbox.declare_queue(target text, lanes int) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if declare_queue.target is null or not starts_with(declare_queue.target, 'actor.') then
    raise exception using errcode = 'OB003',
      message = 'only queues of actors are declared like this',
      hint = 'Register any other participant with select outbox.register(name).';
  end if;
  if exists (select from outbox.participant p where p.target = declare_queue.target) then
    return false;
  end if;
  begin
    return outbox.register(declare_queue.target, coalesce(declare_queue.lanes, 4));
  exception
    when sqlstate 'OB010' then return false;  -- another one was quicker
  end;
end $$;

-- Whether everything is done that was committed for a queue: nothing waits, nothing runs, nothing is to be retried.
create function outbox.queue_idle(target text) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select not exists (select from outbox.parked p
                      where p.target = queue_idle.target and p.reason in ('retry', 'due', 'running', 'blocked'))
     and not exists (
           select from outbox.lane l
             left join lateral (select p.tick, p.upto, p.open from outbox.position p
                                 where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
             join outbox.tick t on t.id = coalesce(p.tick, (select min(id) from outbox.tick))
            where l.target = queue_idle.target
              and (coalesce(p.upto, 0) <> 0 or cardinality(coalesce(p.open, '{}')) > 0
                   or exists (select from outbox.log g
                               where g.target = l.target and g.slot between l.slot_low and l.slot_high
                                 and g.id > t.floor and not outbox.shows(t.first, t.high, t.snapshot, g.xid, g.id))
                   or exists (select from outbox.log g
                               where g.target = l.target and g.slot between l.slot_low and l.slot_high
                                 and g.xid = any (array(select pg_snapshot_xip(t.snapshot))) and g.id >= t.first)))
$$;

-- Drops what a queue has: for tests, and for an operator who knows. False if something was committed that no tick
-- shows yet: call it again. What is running goes on, and its acknowledgement does nothing. Sagas are told.
create function outbox.flush_queue(target text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  newest  outbox.tick;
  dropped bigint[];
begin
  if flush_queue.target is null or not starts_with(flush_queue.target, 'actor.') then
    raise exception using errcode = 'OB003',
      message = 'only queues of actors are flushed',
      hint = 'Skip intents of other participants, each with its reason: outbox parked skip.';
  end if;
  perform from outbox.lane l where l.target = flush_queue.target order by l.lane for update;
  select t.* into newest from outbox.tick t order by t.id desc limit 1;
  if exists (select from outbox.log g
              where g.target = flush_queue.target and g.id > newest.floor
                and not outbox.shows(newest.first, newest.high, newest.snapshot, g.xid, g.id)) then
    return false;
  end if;
  select coalesce(array_agg(g.id), '{}') into dropped
    from outbox.lane l
    left join lateral (select p.tick, p.open from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
    join outbox.tick t on t.id = coalesce(p.tick, (select min(id) from outbox.tick))
    join outbox.log g on g.target = l.target and g.slot between l.slot_low and l.slot_high and g.saga is not null
   where g.id = any (p.open) or exists (select from outbox.parked k where k.id = g.id and k.reason <> 'poison')
      or (g.id > t.floor and not outbox.shows(t.first, t.high, t.snapshot, g.xid, g.id))
      or (g.xid = any (array(select pg_snapshot_xip(t.snapshot))) and g.id >= t.first);
  perform outbox.saga_report(dropped, array_fill('failed'::text, array[cardinality(dropped)]),
                             array_fill('its queue was flushed'::text, array[cardinality(dropped)]));
  delete from outbox.receipt r where r.target = flush_queue.target;
  delete from outbox.parked p where p.target = flush_queue.target;
  -- Whoever owns the lanes is fenced off, and begins anew behind everything.
  update outbox.lane l
     set epoch = l.epoch + 1, owner = null, place = null, lease_until = null, suspect = null
   where l.target = flush_queue.target;
  insert into outbox.position (target, lane, epoch, tick)
    select l.target, l.lane, l.epoch, newest.id from outbox.lane l where l.target = flush_queue.target;
  return true;
end $$;

---------------------------------------------------------------------------------------- exactly once
-- Acknowledges a message in the transaction of what its actor wrote: both, or neither. Holds the lane (or the
-- message's own row) against anybody else until that transaction ends. SQLSTATE OB005: it is another one's by now, or
-- was acknowledged like this before; the transaction must be rolled back.
create function outbox.actor_done(id bigint, target text, lane int, epoch bigint, holder uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  ours boolean;
begin
  if actor_done.holder is not null then
    -- It has a row of its own: without it, nobody runs it again.
    delete from outbox.parked p
     where p.id = actor_done.id and p.reason = 'running' and p.holder = actor_done.holder
       and starts_with(p.target, 'actor.');
    ours := found;
    if ours then
      delete from outbox.receipt r where r.id = actor_done.id;
    end if;
  else
    perform from outbox.lane l
      where l.target = actor_done.target and l.lane = actor_done.lane and l.epoch = actor_done.epoch
        and l.owner is not null and starts_with(l.target, 'actor.') for share;
    ours := found;
    if ours then
      -- The lane's position still has it as open. The next one that is written takes this away again.
      insert into outbox.receipt (id, target, slot, state, epoch, closed_at)
        select g.id, g.target, g.slot, 'closed', actor_done.epoch, outbox.now()
          from outbox.log g where g.id = actor_done.id and g.target = actor_done.target
        on conflict do nothing;
      ours := found;
    end if;
  end if;
  if not ours then
    raise exception using errcode = 'OB005',
      message = 'the message is not in this worker''s hands any more',
      hint = 'Nothing was written: whoever has it now runs it.';
  end if;
  perform outbox.saga_report(array[actor_done.id], array['applied'], array['']);
end $$;

------------------------------------------------------------------------------------------ reporting
-- Tells the engine what became of messages that are steps of sagas (outbox.saga_report). Not by the lane's epoch: a
-- message that is running may outlive its lane's owner, and belongs to its holder.
create function outbox.actor_report(ids bigint[], verdicts text[], errors text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  select outbox.saga_report(array_agg(r.id order by r.place), array_agg(r.verdict order by r.place),
                            array_agg(r.error order by r.place))
    from unnest(ids, verdicts, errors) with ordinality as r (id, verdict, error, place)
    join outbox.log l on l.id = r.id
   where starts_with(l.target, 'actor.')
$$;

----------------------------------------------------------------------------------- read your writes
-- As in 0007; and a lane must have nothing of the transaction in hand.
create or replace function outbox.reached(xid xid8, target text, id bigint default null) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(bool_and(coalesce(
           case when t.first = e.first then pg_visible_in_snapshot(reached.xid, t.snapshot)
                else t.first > e.first end, false)
         and not exists (select from outbox.log g where g.id = any (p.open) and g.xid = reached.xid)), false)
    from outbox.lane l
   cross join (select max(first) as first from outbox.era where first <= coalesce(reached.id, first)) as e
    left join lateral (select p.tick, p.open from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p on true
    left join outbox.tick t on t.id = p.tick
   where l.target = reached.target
$$;

------------------------------------------------------------------------------------------- decisions
-- As in 0002, with one case more: a message that is running is its holder's, as long as that is there.
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
  return null;
end $$;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.consumer from public;
revoke all on function outbox.declare_queue(text, int) from public;
revoke all on function outbox.queue_idle(text) from public;
revoke all on function outbox.flush_queue(text) from public;
revoke all on function outbox.actor_report(bigint[], text[], text[]) from public;
revoke all on function outbox.actor_done(bigint, text, int, bigint, uuid) from public;

grant select on outbox.consumer to outbox_worker, outbox_operator, outbox_reader;
grant insert, update, delete on outbox.consumer to outbox_actor;
grant execute on function outbox.declare_queue(text, int) to outbox_app, outbox_operator;
grant execute on function outbox.queue_idle(text) to outbox_app, outbox_operator, outbox_reader;
grant execute on function outbox.flush_queue(text) to outbox_actor, outbox_operator;
grant execute on function outbox.actor_report(bigint[], text[], text[]) to outbox_actor;
grant execute on function outbox.actor_done(bigint, text, int, bigint, uuid) to outbox_app;

reset role;
