-- What operators do with parked intents, and the audit trail of it.

set local role outbox_owner;

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
