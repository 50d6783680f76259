-- Sagas: what is known of tries that failed, signals that come before their saga, and decisions about parked steps.
--
-- A try that failed may have had its effect all the same: a request that timed out. An intent that is set aside says so
-- (`doubtful`), and its saga undoes what may have happened. What an operator decides about a parked intent of a saga
-- goes to the engine as one intent, `decided`, by whichever command it was said.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

---------------------------------------------------------------------------------------------- parked
-- Whether a try that failed may have had its effect all the same. Once it may have, later tries don't change that.
alter table outbox.parked add column doubtful boolean not null default false;

----------------------------------------------------------------------------------------------- early
-- Signals and cancels whose saga has not started: its start takes them along, in the order of the log.
create table outbox.saga_early (
  -- The intent.
  id      bigint      primary key,
  saga    uuid        not null,
  action  text        not null check (action in ('signal', 'cancel')),
  payload jsonb       not null,
  at      timestamptz not null default outbox.now()
);
create index saga_early_saga on outbox.saga_early (saga, id);
create index saga_early_at on outbox.saga_early (at);

----------------------------------------------------------------------------------------------- locks
-- The head of a lock's queue, however long that is.
create index saga_lock_queue on outbox.saga_lock (name, since);

------------------------------------------------------------------------------------------- reporting
drop trigger audit_saga on outbox.audit;
drop function outbox.saga_decided();
-- Not for workers any more: for functions of ours, which know whose intents these are.
revoke execute on function outbox.saga_report(bigint[], text[], text[]) from outbox_worker;

-- Tells the engine what became of intents of sagas: appends one `outcome` for each id that belongs to one. What was
-- not applied becomes void. Only the owner of a lane can tell, and only of the lane's own intents: returns false, with
-- nothing done, if the epoch is not the lane's. Called by workers.reader in the transaction that records the same for
-- itself.
create function outbox.saga_report(target text, lane int, epoch bigint, ids bigint[], verdicts text[], errors text[])
returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  mine outbox.lane;
begin
  select l.* into mine from outbox.lane l
   where l.target = saga_report.target and l.lane = saga_report.lane and l.epoch = saga_report.epoch
     and l.owner is not null;
  if not found then
    return false;
  end if;
  perform outbox.saga_report(array_agg(r.id order by r.place), array_agg(r.verdict order by r.place),
                             array_agg(r.error order by r.place))
     from unnest(ids, verdicts, errors) with ordinality as r (id, verdict, error, place)
     join outbox.log l on l.id = r.id
    where l.target = mine.target and l.slot between mine.slot_low and mine.slot_high;
  return true;
end $$;

-- Whether a receipt says that something has happened: what was only refused has not. After an attempt that was
-- recorded and has no outcome, it may have.
create function outbox.saga_traced(receipt outbox.receipt) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select receipt.state <> 'partial' or jsonb_strip_nulls(receipt.evidence) - 'refused' <> '{}'
$$;

-- An operator's decision about a parked intent of a saga is for its engine to know: `decided`, with who and why. One
-- that is skipped is void from then on.
create function outbox.saga_decided() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  of_saga uuid;
begin
  if new.action = 'not_applied' then
    -- That settles what tries before may have done, too.
    update outbox.parked p set doubtful = false where p.id = new.intent;
  end if;
  select l.saga into of_saga from outbox.log l where l.id = new.intent;
  if of_saga is null then
    return null;
  end if;
  if new.action = 'skip' then
    insert into outbox.saga_void (id, answered) values (new.intent, true) on conflict (id) do update set answered = true;
  end if;
  insert into outbox.log (target, action, key, payload)
    select 'saga', 'decided', of_saga::text,
           jsonb_build_object('intent', new.intent, 'decision', new.action, 'reason', new.note, 'who', new.who,
                              'doubtful', p.doubtful or exists (select from outbox.receipt r
                                                                 where r.id = p.id and outbox.saga_traced(r)))
      from outbox.parked p where p.id = new.intent;
  return null;
end $$;
create trigger audit_saga after insert on outbox.audit
  for each row execute function outbox.saga_decided();

-- What an operator asks of a saga: cancel it; retry or skip a step that is stuck; or resolve one, by saying whether it
-- has happened. A step whose intent is parked is decided about there, as outbox.decide does it, in this transaction:
-- what can't be decided now is refused. About anything else the engine decides; what it refuses, and who asked, is in
-- outbox.saga_event. Returns the id of the intent that tells the engine.
create or replace function outbox.saga_ask(saga uuid, action text, step text default null, happened boolean default null,
                                           note text default '')
returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  drawn    bigint;
  aside    bigint;
  in_doubt boolean;
  verdict  text;
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
  if saga_ask.action <> 'cancel' then
    select p.id, p.reason = 'in_doubt' into aside, in_doubt
      from outbox.saga_step t join outbox.parked p on p.id = t.intent join outbox.log l on l.id = p.id
     where t.saga = saga_ask.saga and t.step = saga_ask.step and t.state in ('running', 'recalled', 'undoing')
       and p.reason <> 'skipped' and l.saga is not null;
  end if;
  -- One that is to be tried again and is said to have happened, or not, is recalled by the engine.
  if aside is not null and (in_doubt or saga_ask.action <> 'resolve') then
    verdict := case saga_ask.action when 'resolve' then case when happened then 'applied' else 'not_applied' end
                                    else saga_ask.action end;
    select d.refused into verdict from outbox.decide(verdict, array[aside], coalesce(saga_ask.note, '')) as d;
    if verdict is not null then
      raise exception using errcode = 'OB003',
        message = 'the intent ' || aside || ' of the step is parked, and can not be decided about so: ' || verdict,
        hint = 'See outbox saga show, and outbox parked list.';
    end if;
    -- Told by the trigger of the decision's row, just before.
    return currval('outbox.log_id');
  end if;
  insert into outbox.log (target, action, key, payload)
    values ('saga', saga_ask.action, saga_ask.saga::text,
            jsonb_strip_nulls(jsonb_build_object('step', saga_ask.step, 'happened', saga_ask.happened,
                                                 'reason', saga_ask.note, 'who', session_user)))
    returning id into drawn;
  return drawn;
end $$;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.saga_early from public;
revoke all on function outbox.saga_report(text, int, bigint, bigint[], text[], text[]) from public;
revoke all on function outbox.saga_traced(outbox.receipt) from public;
revoke all on function outbox.saga_decided() from public;

grant select on outbox.saga_early to outbox_worker, outbox_operator, outbox_reader;
grant insert, delete on outbox.saga_early to outbox_saga;
grant execute on function outbox.saga_report(text, int, bigint, bigint[], text[], text[]) to outbox_worker;
grant execute on function outbox.saga_traced(outbox.receipt) to outbox_worker;

reset role;
