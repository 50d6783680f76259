-- Keys of actors: messages of one key of a queue run one at a time in the order of the log, or so many at a time.
--
-- All messages of a key are in one lane, and its owner gives them their turns. How many of a key may run is said by the
-- intent's action: `send` (its key means nothing), `send.ordered` (one, in order; `send.ordered.passed` if those behind
-- are to go on when it is given up), `send.limited.N`. One that finds the
-- way free is claimed like any message. One that has to wait is parked as `blocked`, however many of them there are,
-- and the lane goes on. Whoever records that a message is done gives the next one of its key its turn in the same
-- transaction: it is parked as `retry`, due at once, and the owner takes it in hand as it takes any retry, if nothing
-- is in its way. What is in the hands of other processes (`running`) counts; a dead letter (`poison`) holds up an
-- order until an operator has decided, and no limit.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

-- Asked for each key, where a million rows of one key may wait.
drop index outbox.parked_running;
create index parked_running on outbox.parked (target, key) where reason = 'running';
create index parked_blocked on outbox.parked (target, key, id) where reason = 'blocked';
create index parked_line on outbox.parked (target, key, id) where reason not in ('due', 'skipped');
create index saga_void_unanswered on outbox.saga_void (id) where not answered;

-- How many messages of its key may run when one with this action does: null: its key means nothing; 0: one, in the
-- order of the log; else so many.
create function outbox.turns(action text) returns int
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when action in ('send.ordered', 'send.ordered.passed') then 0
              when action ~ '^send\.limited\.[1-9][0-9]{0,3}$' then substr(action, 14)::int end
$$;

-- Whether a parked message holds up no order: its time hasn't come, it was skipped, or it was given up and is passed.
create function outbox.aside(message outbox.parked) returns boolean
language sql stable set search_path = pg_catalog, pg_temp
as $$
  select message.reason in ('due', 'skipped')
      or (message.reason = 'poison'
          and exists (select from outbox.log l where l.id = message.id and l.action = 'send.ordered.passed'))
$$;

-- As in 0009; and what waits behind a dead letter waits for an operator, not for a worker.
create or replace function outbox.queue_idle(target text) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select not exists (select from outbox.parked p
                      where p.target = queue_idle.target and p.reason in ('retry', 'due', 'running'))
     and not exists (select from outbox.parked p
                      where p.target = queue_idle.target and p.reason = 'blocked'
                        and not exists (select from outbox.parked h
                                         where h.target = p.target and h.key = p.key and h.id < p.id
                                           and h.reason not in ('due', 'skipped') and h.reason = 'poison'
                                           and not outbox.aside(h)))
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

revoke all on function outbox.turns(text) from public;
revoke all on function outbox.aside(outbox.parked) from public;
grant execute on function outbox.turns(text) to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.aside(outbox.parked) to outbox_worker, outbox_operator, outbox_reader;

reset role;
