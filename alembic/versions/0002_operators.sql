-- What operators do with parked intents, and the audit trail of it.
--
-- An operator decides through outbox.decide, and in no other way: the right to update outbox.parked that 0001 gave is
-- taken back here, so that nobody acts without leaving a row in outbox.audit, in the same transaction.
--
-- Workers are trying the same intents meanwhile. Which of the two comes first is decided by the row lock of the parked
-- intent: a worker that takes one for a try notes its epoch in `trying` under that lock, and records the outcome under
-- it. A decision that finds a try under way is refused ("look again"); one that comes before the try is what the worker
-- finds. A decision never waits for a lock while it holds one, so it can't take part in a deadlock.
--
-- SQLSTATEs of our own: OB004 the decision is not one that can be taken.

set local role outbox_owner;

---------------------------------------------------------------------------------------------- parked
-- The epoch of the owner that is trying it now. That of a former owner means nothing.
alter table outbox.parked add column trying bigint;

-- A skipped intent keeps its row: an index that is restored from last week reads the log again, and must find out.
alter table outbox.parked drop constraint parked_reason_check;
alter table outbox.parked add constraint parked_reason_check
  check (reason in ('retry', 'poison', 'in_doubt', 'blocked', 'due', 'skipped'));

----------------------------------------------------------------------------------------------- audit
create table outbox.audit (
  id     bigint      primary key generated always as identity,
  at     timestamptz not null default outbox.now(),
  -- The database's user; and what the command said about the system's user and host, which nobody has checked.
  who    text        not null default session_user,
  client text        not null default '',
  action text        not null check (action in ('retry', 'skip', 'applied', 'not_applied')),
  intent bigint      not null,
  target text        not null,
  -- What the intent was parked for, and its error, before the action.
  reason text        not null,
  error  text        not null default '',
  note   text        not null default ''
);
create index audit_intent on outbox.audit (intent);
create trigger audit_append_only before update or delete on outbox.audit
  for each row execute function outbox.refuse_change();
create trigger audit_no_truncate before truncate on outbox.audit
  for each statement execute function outbox.refuse_change();

-------------------------------------------------------------------------------------------- decisions
-- Takes a decision about parked intents:
--   retry        try it now, as if it had never failed
--   skip         never try it (again); its worker gives the next one of its key its turn
--   applied      about one in doubt: its effect did happen. Its receipt is closed for good
--   not_applied  about one in doubt: its effect did not happen. It is tried again
-- One row comes back for each id: what it was parked for, and why nothing was done (null: it was done).
create function outbox.decide(action text, ids bigint[], note text default '', client text default '')
returns table (id bigint, target text, reason text, refused text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  wanted  bigint;
  intent  outbox.parked;
  settled text[];
  acted   boolean := false;
begin
  if decide.action is null or decide.action not in ('retry', 'skip', 'applied', 'not_applied') then
    raise exception using errcode = 'OB004',
      message = 'there is no such decision',
      hint = 'Decide retry, skip, applied or not_applied.';
  end if;
  if length(decide.note) > 1000 or length(decide.client) > 200 then
    raise exception using errcode = 'OB004',
      message = 'the note is longer than 1000 characters, or the client than 200',
      hint = 'Write a shorter one.';
  end if;
  for wanted in select distinct n from unnest(decide.ids) as n where n is not null order by n loop
    select p.* into intent from outbox.parked p where p.id = wanted for update skip locked;
    decide.id := wanted;
    decide.target := intent.target;
    decide.reason := intent.reason;
    decide.refused := case
      when intent.id is not null then outbox.objection(decide.action, intent)
      when exists (select from outbox.parked p where p.id = wanted)
        then 'it is being tried or decided about right now: look again'
      else 'it is not parked: see outbox why' end;
    if decide.refused is null then
      acted := true;
      insert into outbox.audit (action, intent, target, reason, error, note, client)
        values (decide.action, wanted, intent.target, intent.reason, intent.error,
                coalesce(decide.note, ''), coalesce(decide.client, ''));
      case decide.action
        when 'skip' then
          update outbox.parked p set reason = 'skipped', retry_at = null, deaths = 0, trying = null where p.id = wanted;
        when 'applied' then
          insert into outbox.receipt as r (id, target, slot, state, epoch, evidence, closed_at)
            values (wanted, intent.target, intent.slot, 'closed', 0,
                    jsonb_build_object('heuristic', jsonb_build_object('applied', true, 'by', session_user)),
                    outbox.now())
            on conflict (id) do update
               set state = 'closed', evidence = (r.evidence - 'doubt') || excluded.evidence, closed_at = excluded.closed_at;
          delete from outbox.parked p where p.id = wanted;
        else
          -- What was done stays known. What was refused is tried again; a doubt goes only if it is what was decided.
          settled := case decide.action when 'retry' then array['refused'] else array['refused', 'doubt'] end;
          delete from outbox.receipt r where r.id = wanted and r.state in ('open', 'partial') and r.evidence - settled = '{}';
          update outbox.receipt r set state = 'partial', evidence = r.evidence - settled
           where r.id = wanted and r.state in ('open', 'partial');
          -- One that is due stays out of its key's order.
          update outbox.parked p
             set reason = case when p.reason = 'due' then 'due' else 'retry' end,
                 retry_at = outbox.now(), attempts = 0, deaths = 0, trying = null
           where p.id = wanted;
      end case;
    end if;
    return next;
  end loop;
  if acted then
    -- Wakes the workers, who give what is blocked behind nothing any more its turn: they know what they have in hand.
    perform pg_notify('outbox_tick', 'decided');
  end if;
end $$;

-- Why a decision about a parked intent can't be taken now, or null. The caller holds the intent's row.
create function outbox.objection(action text, intent outbox.parked) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  holder outbox.lane;
  head   bigint;
begin
  if intent.reason = 'skipped' then
    return 'it was skipped: emit another intent instead';
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
revoke all on outbox.audit from public;
revoke all on function outbox.decide(text, bigint[], text, text) from public;
revoke all on function outbox.objection(text, outbox.parked) from public;
grant select on outbox.audit to outbox_worker, outbox_operator, outbox_reader;
revoke update (reason, retry_at, attempts) on outbox.parked from outbox_operator;
grant execute on function outbox.decide(text, bigint[], text, text) to outbox_operator;

------------------------------------------------------------------------------------------------ lanes
-- Makes a participant known, with its lanes (1 unless said otherwise), or changes how many it has. Returns false
-- if there was nothing to do. A lane's effects and its position are about its slots of keys, so the number can
-- change only while there are none: before anything was applied. SQLSTATE OB010 says what is in the way.
create or replace function outbox.register(target text, lanes int default null) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  had    smallint;
  epochs bigint;
  way    text;
  help   text := 'Stop its workers, and look at what outbox status says of it.';
begin
  insert into outbox.participant (target, lanes) values (register.target, coalesce(register.lanes, 1))
    on conflict do nothing;
  if not found then
    select p.lanes into had from outbox.participant p where p.target = register.target for update;
    if register.lanes is null or register.lanes = had then
      return false;
    end if;
    -- Until the end of this transaction, no worker can claim one.
    perform from outbox.lane l where l.target = register.target for update;
    if register.target = 'clock' then
      way := 'it is the lease of the clock, of which there is one';
      help := 'Nothing is gained by more.';
    elsif exists (select from outbox.lane l where l.target = register.target and l.owner is not null) then
      way := 'a worker has one of them';
    elsif exists (select from outbox.parked p where p.target = register.target)
       or exists (select from outbox.receipt r where r.target = register.target) then
      way := 'some of its intents are parked or were tried';
    elsif exists (select from outbox.position p where p.target = register.target)
      and exists (select from outbox.log l where l.target = register.target) then
      way := 'some of its intents may be applied already';
    end if;
    if way is not null then
      if starts_with(way, 'some') then
        help := 'It takes a rebuild of the participant (resilver), which this version does not have yet.';
      end if;
      raise exception using errcode = 'OB010',
        message = 'the number of lanes of ' || quote_literal(register.target) || ' stays ' || had || ': ' || way,
        hint = help;
    end if;
    -- What has passed nothing can begin anew.
    delete from outbox.position p where p.target = register.target;
    select max(l.epoch) into epochs from outbox.lane l where l.target = register.target;
    delete from outbox.lane l where l.target = register.target;
    update outbox.participant p set lanes = register.lanes where p.target = register.target;
  end if;
  -- Epochs go on from where they were: stores remember them.
  insert into outbox.lane (target, lane, slot_low, slot_high, epoch)
    select p.target, n, n * 16384 / p.lanes, (n + 1) * 16384 / p.lanes - 1, coalesce(epochs, 0)
      from outbox.participant p, generate_series(0, p.lanes - 1) as n
     where p.target = register.target;
  return true;
end $$;

reset role;
