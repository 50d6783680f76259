-- Skipped messages of actors, and who waits for their results.
--
-- A result is made by dramatiq's middleware, in a worker: what it is called, how long it is kept and whether there is to
-- be one, nobody else knows. An operator's decision is taken in SQL. So it leaves a mark, and the next worker of the queue
-- that sees it stores the failure, in the transaction that takes the mark away.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

---------------------------------------------------------------------------------------------- parked
-- Whether a message of an actor was skipped, and those who wait for its result have not been told.
alter table outbox.parked add column untold boolean not null default false;
create index parked_untold on outbox.parked (target) where untold;

-------------------------------------------------------------------------------------------- decisions
-- As in 0002: takes a decision about parked intents. A message of an actor that is skipped is left to be told.
--   retry        try it now, as if it had never failed
--   skip         never try it (again); its worker gives the next one of its key its turn
--   applied      about one in doubt: its effect did happen. Its receipt is closed for good
--   not_applied  about one in doubt: its effect did not happen. It is tried again
-- One row comes back for each id: what it was parked for, and why nothing was done (null: it was done).
create or replace function outbox.decide(action text, ids bigint[], note text default '', client text default '')
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
          -- Of one that was given up it is told already.
          update outbox.parked p
             set reason = 'skipped', retry_at = null, deaths = 0, trying = null,
                 untold = starts_with(p.target, 'actor.') and p.reason <> 'poison'
           where p.id = wanted;
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

reset role;
