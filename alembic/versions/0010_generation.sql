-- Generations: which of a participant's data its lanes write.
--
-- A resilver builds the next generation beside the one that serves, and then swaps them. The number here is what
-- counts: whoever claims a lane is told it in the same statement, and writes that generation and no other. What the
-- participant keeps of it for its own readers (the index: a file CURRENT) follows, by whoever comes next.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

-- 0: there was never a resilver.
alter table outbox.participant add column generation bigint not null default 0 check (generation >= 0);

------------------------------------------------------------------------------------------------ swap
-- Makes `generation` the one that the lanes write, cut into as many lanes as `ticks` has, lane n standing at ticks[n].
-- In one step, so that no lane is ever of one generation and another one of the next:
--   * the old lanes go, and with them the leases and epochs of their owners: from here on they are fenced;
--   * the new ones have higher epochs, and belong to the caller, who drains them to where the old ones were.
-- `again`: intents that were set aside when the new generation was built. Those that were applied since, by the old
-- lanes alone, are tried again in the new ones.
-- SQLSTATE OB016 when another swap came in between.
create function outbox.swap(target text, was bigint, generation bigint, ticks bigint[], again bigint[],
                            owner uuid, place text, ttl double precision)
returns table (lane smallint, epoch bigint, slot_low smallint, slot_high smallint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  had    bigint;
  epochs bigint;
  count  int := coalesce(array_length(ticks, 1), 0);
begin
  if swap.target = 'clock' or count not between 1 and 256 or swap.generation <= swap.was then
    raise exception using errcode = 'OB016', message = 'this is no generation to swap to',
      hint = 'Run outbox resilver, which calls this function.';
  end if;
  select p.generation into had from outbox.participant p where p.target = swap.target for update;
  if had is distinct from swap.was then
    raise exception using errcode = 'OB016',
      message = quote_literal(swap.target) || ' is at generation ' || coalesce(had::text, '(none)')
             || ' and not at ' || swap.was || ' any more',
      hint = 'Another resilver was faster: run outbox status.';
  end if;
  if exists (select from unnest(ticks) as n (tick) where not exists (select from outbox.tick t where t.id = n.tick)) then
    raise exception using errcode = 'OB016', message = 'a tick that the new lanes would stand at is not in the log',
      hint = 'Resume the resilver: it catches up first.';
  end if;
  -- An owner that is just writing its position holds its lane's row, and is waited for.
  perform from outbox.lane l where l.target = swap.target for update;
  select max(l.epoch) + 1 into epochs from outbox.lane l where l.target = swap.target;
  insert into outbox.parked (id, target, slot, key, reason, retry_at)
    select l.id, l.target, l.slot, l.key, 'retry', outbox.now()
      from outbox.log l
     where l.id = any (swap.again) and l.target = swap.target
       and not exists (select from outbox.parked p where p.id = l.id)
       and not exists (select from outbox.saga_void v where v.id = l.id);
  delete from outbox.position p where p.target = swap.target;
  delete from outbox.lane l where l.target = swap.target;
  update outbox.participant p set lanes = count, generation = swap.generation where p.target = swap.target;
  insert into outbox.lane (target, lane, slot_low, slot_high, epoch, owner, place, lease_until)
    select swap.target, n, n * 16384 / count, (n + 1) * 16384 / count - 1, epochs, swap.owner, swap.place,
           outbox.now() + make_interval(secs => swap.ttl)
      from generate_series(0, count - 1) as n;
  insert into outbox.position (target, lane, epoch, tick)
    select swap.target, n - 1, epochs, ticks[n] from generate_series(1, count) as n;
  -- The old owners look at once whether they are still that.
  perform pg_notify('outbox_tick', 'halted');
  return query select l.lane, l.epoch, l.slot_low, l.slot_high
    from outbox.lane l where l.target = swap.target order by l.lane;
end $$;

revoke all on function outbox.swap(text, bigint, bigint, bigint[], bigint[], uuid, text, double precision) from public;
grant execute on function outbox.swap(text, bigint, bigint, bigint[], bigint[], uuid, text, double precision)
  to outbox_operator;

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
      and (exists (select from outbox.log l where l.target = register.target)
           or exists (select from outbox.base b where b.target = register.target)) then
      way := 'some of its intents may be applied already';
    end if;
    if way is not null then
      if starts_with(way, 'some') then
        help := case when register.target = 'index'
                     then 'Run outbox resilver index --shards N, which builds it anew with so many.'
                     else 'Its keys would have to be dealt out anew (resilver), which there is for the index only.' end;
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
