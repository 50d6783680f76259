-- Actors, what a storm of faults has shown.
--
-- Death. A message that was in hand when its worker died may have killed it, and so may any other that was there. It is
-- tried again in company, twice; then alone: a process takes nothing else in hand as long as it runs. Only a death alone
-- is held against it. `alone` is written with the try, and taken back before anything else is taken in hand.
--
-- Acknowledgement. A lane may go to another consumer while an actor is about to acknowledge in its own transaction. The
-- message has a row of its own then, and that is as good as the lane.

set local role outbox_owner;

---------------------------------------------------------------------------------------------- parked
-- Whether it is the only message that its holder has in hand. Means nothing for other reasons than `running`, or when
-- it wasn't in hand at the last death.
alter table outbox.parked add column alone boolean not null default false;

---------------------------------------------------------------------------------------- exactly once
-- As in 0009; and a message of a lane (`epoch`) that was set aside for this holder meanwhile is still in its hands.
create or replace function outbox.actor_done(id bigint, target text, lane int, epoch bigint, holder uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  ours boolean := false;
begin
  if actor_done.epoch > 0 then
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
  if not ours and actor_done.holder is not null then
    -- It has a row of its own: without it, nobody runs it again.
    delete from outbox.parked p
     where p.id = actor_done.id and p.reason = 'running' and p.holder = actor_done.holder
       and starts_with(p.target, 'actor.');
    ours := found;
    if ours then
      delete from outbox.receipt r where r.id = actor_done.id;
    end if;
  end if;
  if not ours then
    raise exception using errcode = 'OB005',
      message = 'the message is not in this worker''s hands any more',
      hint = 'Nothing was written: whoever has it now runs it.';
  end if;
  perform outbox.saga_report(array[actor_done.id], array['applied'], array['']);
end $$;

reset role;
