-- The relay: queues whose messages are handed on to dramatiq's own broker, RabbitMQ or Redis.
--
-- A queue is either worked here, by workers of actors, or relayed: outbox.relay has a row for those that are. The lanes of
-- a relayed queue are drained like those of any participant; what was handed on and confirmed is done here, at least once.
--
-- Not so the step of a saga: its message is noted in outbox.relayed before it is handed on, and stays there as not heard of
-- until the far side has told what became of it (outbox.relay_told). The engine hears of it then, and not before.
--
-- SQLSTATEs of our own: OB070 a queue can't be relayed, or worked here again, because somebody is at it.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

create table outbox.relay (
  target text        primary key references outbox.participant,
  since  timestamptz not null default outbox.now()
);

-- Steps of sagas that were handed on, or were about to be.
create table outbox.relayed (
  id         bigint      primary key,
  target     text        not null,
  relayed_at timestamptz not null default outbox.now(),
  -- What the far side said; null: nothing yet.
  verdict    text        check (verdict in ('applied', 'failed')),
  heard_at   timestamptz,
  check ((verdict is null) = (heard_at is null))
);
create index relayed_open on outbox.relayed (relayed_at) where verdict is null;

---------------------------------------------------------------------------------------------- hand-over
-- Makes a queue a relayed one, or one that is worked here again; false if it is that already. What its workers had in
-- hand is tried anew by whoever has the queue now. Refused while a worker takes part in the queue, or a relay owns a lane.
create function outbox.relay_queue(target text, relayed boolean) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  here bigint;
begin
  if relay_queue.target is null or relay_queue.relayed is null or not starts_with(relay_queue.target, 'actor.')
     or not exists (select from outbox.participant p where p.target = relay_queue.target) then
    raise exception using errcode = 'OB003',
      message = 'there is no such queue of actors',
      hint = 'Send to it first, or declare it with select outbox.declare_queue(name, lanes).';
  end if;
  -- Nobody begins to take part meanwhile: whoever comes after this transaction sees whose the queue is.
  lock table outbox.consumer in share row exclusive mode;
  if relay_queue.relayed = exists (select from outbox.relay r where r.target = relay_queue.target) then
    return false;
  end if;
  perform from outbox.lane l where l.target = relay_queue.target order by l.lane for update;
  if relay_queue.relayed then
    select count(*) into here from outbox.consumer c
     where c.target = relay_queue.target and c.lease_until > outbox.now();
    if here > 0 then
      raise exception using errcode = 'OB070',
        message = relay_queue.target || ' is worked here, by ' || here || ' process(es)',
        hint = 'Stop them, or let them serve other queues; one that was killed counts until its lease is over.';
    end if;
    insert into outbox.relay (target) values (relay_queue.target);
    -- What was in hand, unless its actor has acknowledged it in its own transaction.
    insert into outbox.parked (id, target, slot, key, reason, retry_at, error)
    select g.id, g.target, g.slot, g.key, 'retry', outbox.now(), 'its queue is relayed by now'
      from outbox.lane l
     cross join lateral (select p.open from outbox.position p
                          where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p
      join outbox.log g on g.id = any (p.open)
     where l.target = relay_queue.target
       and not exists (select from outbox.receipt r where r.id = g.id and r.state = 'closed')
    on conflict (id) do nothing;
    delete from outbox.receipt r where r.target = relay_queue.target;
  else
    select count(*) into here from outbox.lane l
     where l.target = relay_queue.target and l.owner is not null and l.lease_until > outbox.now();
    if here > 0 then
      raise exception using errcode = 'OB070',
        message = relay_queue.target || ' is being relayed right now',
        hint = 'Stop its relay; one that was killed counts until its lease is over.';
    end if;
    delete from outbox.relay r where r.target = relay_queue.target;
  end if;
  update outbox.parked p
     set reason = 'retry', retry_at = outbox.now(), holder = null, deaths = 0, trying = null
   where p.target = relay_queue.target and p.reason in ('running', 'blocked');
  update outbox.lane l
     set epoch = l.epoch + 1, owner = null, place = null, lease_until = null, suspect = null
   where l.target = relay_queue.target;
  -- The same place, with nothing in hand.
  insert into outbox.position (target, lane, epoch, tick, upto, after)
  select l.target, l.lane, l.epoch, p.tick, p.upto, p.after
    from outbox.lane l
   cross join lateral (select p.tick, p.upto, p.after from outbox.position p
                        where p.target = l.target and p.lane = l.lane order by p.seq desc limit 1) p
   where l.target = relay_queue.target and p.tick is not null;
  return true;
end $$;

---------------------------------------------------------------------------------------------- hearing
-- What the far side says became of messages: `applied`, or `failed` when it has given one up. Said again, nothing happens;
-- nor if the message is not the intent's, because a copy of this database relays to the same broker. The saga of a step
-- is told; any other message that was given up is parked, for an operator. Returns how many were news.
create function outbox.relay_told(ids bigint[], messages text[], verdicts text[], errors text[]) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  told  outbox.relayed;
  why   text;
  fresh bigint := 0;
  more  bigint;
begin
  for told.id, told.verdict, why in
    -- In one order, so that two who tell the same don't wait for each other.
    select t.id, t.verdict, t.error
      from (select distinct on (t.id) t.* from unnest(ids, messages, verdicts, errors) with ordinality
              as t (id, message, verdict, error, place) order by t.id, t.place) t
      join outbox.log l on l.id = t.id and l.payload ->> 'message_id' = t.message
     where t.verdict in ('applied', 'failed')
     order by t.id
  loop
    update outbox.relayed r set verdict = told.verdict, heard_at = outbox.now()
     where r.id = told.id and r.verdict is null;
    if found then
      fresh := fresh + 1;
      -- It may have been set aside because nothing was heard of it.
      delete from outbox.parked p where p.id = told.id and p.reason = 'in_doubt';
      perform outbox.saga_report(array[told.id], array[told.verdict], array[coalesce(why, '')]);
    end if;
  end loop;
  insert into outbox.parked (id, target, slot, key, reason, attempts, error)
  select l.id, l.target, l.slot, l.key, 'poison', 1, left(t.error, 500)
    from unnest(ids, messages, verdicts, errors) as t (id, message, verdict, error)
    join outbox.log l on l.id = t.id and l.payload ->> 'message_id' = t.message
    join outbox.relay q on q.target = l.target
   where t.verdict = 'failed' and l.saga is null
  on conflict (id) do nothing;
  get diagnostics more = row_count;
  return fresh + more;
end $$;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.relay, outbox.relayed from public;
revoke all on function outbox.relay_queue(text, boolean) from public;
revoke all on function outbox.relay_told(bigint[], text[], text[], text[]) from public;

grant select on outbox.relay, outbox.relayed to outbox_worker, outbox_operator, outbox_reader;
grant insert, delete on outbox.relayed to outbox_worker;
grant update (relayed_at) on outbox.relayed to outbox_worker;
grant execute on function outbox.relay_queue(text, boolean) to outbox_worker, outbox_operator;
-- A queue may be relayed before anything is sent to it.
grant execute on function outbox.declare_queue(text, int) to outbox_worker;
-- The workers of the far side connect as the application does, if they connect at all.
grant execute on function outbox.relay_told(bigint[], text[], text[], text[]) to outbox_app, outbox_worker;

reset role;
