-- What actors return, what rate limiters count, and how often actors may begin.
--
-- Three tables of rows that run out: each has a key and the time after which it counts as gone, by the database's clock.
-- Whoever writes a key that has run out finds nothing there; housekeeping removes such rows in groups.
--
-- All are logged. A result belongs to the acknowledgement that it is written with. A barrier that is emptied by a crash
-- of the server never opens, and a rate that forgets its begins lets too many of them through.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

--------------------------------------------------------------------------------------------- results
create table outbox.result (
  key        text        primary key,
  -- JSON as dramatiq's encoder wrote it: text, because jsonb would change numbers.
  value      text        not null check (octet_length(value) <= 1048576),
  expires_at timestamptz not null
);
create index result_expires_at on outbox.result (expires_at);

-- Stores results, and wakes those who wait for one of them: unless `rings` is false, because notifications make the
-- commits of an application wait for each other. Keys are distinct.
create function outbox.store_results(keys text[], "values" text[], ttls float8[], rings boolean) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into outbox.result (key, value, expires_at)
    select n.key, n.value, outbox.now() + make_interval(secs => n.ttl)
      from unnest(store_results.keys, store_results."values", store_results.ttls) as n (key, value, ttl) order by n.key
    on conflict (key) do update set value = excluded.value, expires_at = excluded.expires_at;
  if store_results.rings then
    perform outbox.ring(store_results.keys);
  end if;
end $$;

-- Wakes those who wait for one of these keys. They share 256 channels, and look whether it was theirs.
create function outbox.ring(keys text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  select pg_notify('outbox_bell_' || b.bell, '')
    from (select distinct substr(md5(k.key), 1, 2) as bell from unnest(ring.keys) as k (key)) as b
$$;

----------------------------------------------------------------------------------------- tallies
-- Numbers that rate limiters and barriers count up and down. No index on expires_at: a row that is counted in all the
-- time must be updated in place.
create table outbox.tally (
  key        text        primary key,
  value      bigint      not null,
  -- Messages that have counted it down when they were done: each does so once, however often it runs.
  parties    bigint[]    not null default '{}',
  expires_at timestamptz not null
) with (fillfactor = 70);

-- Before anything is counted. Sums are taken while nothing is counted that belongs to them: keys of one window have
-- the same beginning, up to the last @.
create function outbox.tally_gate(keys text[], alone boolean) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  gate int;
begin
  for gate in select distinct hashtext(regexp_replace(k.key, '@[^@]*$', '')) from unnest(tally_gate.keys) as k (key)
               order by 1 loop
    if tally_gate.alone then
      perform pg_advisory_xact_lock(hashtext('outbox.tally'), gate);
    else
      perform pg_advisory_xact_lock_shared(hashtext('outbox.tally'), gate);
    end if;
  end loop;
end $$;

-- Sets a number that isn't there. → whether it wasn't. `ttl`: seconds.
create function outbox.tally_add(key text, value bigint, ttl float8) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform outbox.tally_gate(array[tally_add.key], false);
  insert into outbox.tally as t (key, value, expires_at)
    values (tally_add.key, tally_add.value, outbox.now() + make_interval(secs => tally_add.ttl))
    on conflict on constraint tally_pkey do update
      set value = excluded.value, parties = '{}', expires_at = excluded.expires_at where t.expires_at <= outbox.now();
  return found;
end $$;

-- Changes a number, 0 if it isn't there, unless it would leave its bounds (null: none). → whether it did.
-- `party`: a message that is done; it changes a number once.
create function outbox.tally_change(key text, delta bigint, low bigint, high bigint, ttl float8, party bigint)
returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  old  outbox.tally;
  gone boolean;
begin
  perform outbox.tally_gate(array[tally_change.key], false);
  insert into outbox.tally (key, value, expires_at) values (tally_change.key, 0, '-infinity')
    on conflict on constraint tally_pkey do nothing;
  select t.* into old from outbox.tally t where t.key = tally_change.key for update;
  gone := old.expires_at <= outbox.now();
  if gone then
    old.value := 0;
    old.parties := '{}';
  elsif tally_change.party = any (old.parties) then
    return true;
  end if;
  old.value := old.value + tally_change.delta;
  if old.value < tally_change.low or old.value > tally_change.high then
    return false;
  end if;
  update outbox.tally t
     set value = old.value, expires_at = outbox.now() + make_interval(secs => tally_change.ttl),
         parties = case when tally_change.party is null then old.parties else old.parties || tally_change.party end
   where t.key = tally_change.key;
  return true;
end $$;

-- What numbers come to. Called while the gate is closed to others.
create function outbox.tally_sum(keys text[]) returns bigint
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(sum(t.value), 0)::bigint from outbox.tally t
   where t.key = any (tally_sum.keys) and t.expires_at > outbox.now()
$$;

------------------------------------------------------------------------------------------------ rates
-- When messages of actors with a rate have begun: at most `places` of one key in any `period`. A row keeps at most a
-- hundred times, with how many began there: those of the same hundredth of the period count as the last of them, so
-- never too many begin, and a place may come back a hundredth of the period late.
create table outbox.rate (
  key        text          not null,
  places     int           not null check (places > 0),
  period     float8        not null check (period > 0),
  begins     timestamptz[] not null default '{}',
  counts     int[]         not null default '{}',
  -- Where the queue ends of those that were told a time.
  tail       timestamptz,
  expires_at timestamptz   not null,
  primary key (key, places, period)
) with (fillfactor = 70);

-- How long messages must wait before they may begin: 0, or seconds, each at its place in the arrays. `begins`: those that
-- need not wait begin now, and that counts; otherwise nothing counts, and it is a good guess. `again`: was told a time
-- before, and that has come; it is told the next place that comes free, others the end of the queue.
create function outbox.rate_ask(keys text[], places int[], periods float8[], again boolean[], begins boolean)
returns float8[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  waits  float8[] := array_fill(0::float8, array[cardinality(rate_ask.keys)]);
  asked  record;
  mine   outbox.rate;
  moment timestamptz;
  at     timestamptz;
  step   interval;
  span   interval;
  free   int;
  told   int;
  slot   int;
begin
  -- In one order, so that two who ask for several keys don't wait for each other.
  for asked in
    select a.key, a.places, a.period, array_agg(a.slot order by not a.again, a.slot) as slots
      from unnest(rate_ask.keys, rate_ask.places, rate_ask.periods, rate_ask.again) with ordinality
             as a (key, places, period, again, slot)
     group by a.key, a.places, a.period order by a.key, a.places, a.period
  loop
    insert into outbox.rate (key, places, period, expires_at)
      values (asked.key, asked.places, asked.period, '-infinity') on conflict do nothing;
    select r.* into mine from outbox.rate r
     where r.key = asked.key and r.places = asked.places and r.period = asked.period for update;
    moment := outbox.now();  -- not before the row is ours
    span := make_interval(secs => asked.period);
    step := make_interval(secs => asked.period / asked.places);
    -- What is far ahead was written by a clock that has been set back since.
    select coalesce(array_agg(b.begin order by b.begin), '{}'), coalesce(array_agg(b.count order by b.begin), '{}'),
           asked.places - coalesce(sum(b.count), 0)
      into mine.begins, mine.counts, free
      from unnest(mine.begins, mine.counts) as b (begin, count)
     where b.begin > moment - span and b.begin <= moment + span;
    told := 0;
    foreach slot in array asked.slots loop
      if free > 0 then
        free := free - 1;
        continue when not rate_ask.begins;
        if cardinality(mine.begins) > 0
           and floor(extract(epoch from mine.begins[cardinality(mine.begins)]) / asked.period * 100)
             = floor(extract(epoch from moment) / asked.period * 100) then
          mine.counts[cardinality(mine.begins)] := mine.counts[cardinality(mine.begins)] + 1;
          mine.begins[cardinality(mine.begins)] := moment;
        else
          mine.begins := mine.begins || moment;
          mine.counts := mine.counts || 1;
        end if;
      else
        at := coalesce(mine.begins[1], moment) + span;
        if rate_ask.again[slot] then
          at := at + told * step;
          told := told + 1;
        else
          at := greatest(at, mine.tail + step);
          mine.tail := at;
        end if;
        waits[slot] := greatest(extract(epoch from at - moment), 0.01);
      end if;
    end loop;
    update outbox.rate r
       set begins = mine.begins, counts = mine.counts, tail = mine.tail,
           expires_at = greatest(moment + span, mine.tail)
     where r.key = asked.key and r.places = asked.places and r.period = asked.period;
  end loop;
  return waits;
end $$;

-- Forgets who was told a time, because a queue was flushed. What has begun still counts.
create function outbox.rate_forget() returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  update outbox.rate r set tail = null where r.tail is not null
$$;

---------------------------------------------------------------------------------------------- grants
revoke all on outbox.result from public;
revoke all on outbox.tally from public;
revoke all on outbox.rate from public;
revoke all on function outbox.store_results(text[], text[], float8[], boolean) from public;
revoke all on function outbox.ring(text[]) from public;
revoke all on function outbox.tally_gate(text[], boolean) from public;
revoke all on function outbox.tally_add(text, bigint, float8) from public;
revoke all on function outbox.tally_change(text, bigint, bigint, bigint, float8, bigint) from public;
revoke all on function outbox.tally_sum(text[]) from public;
revoke all on function outbox.rate_ask(text[], int[], float8[], boolean[], boolean) from public;
revoke all on function outbox.rate_forget() from public;

grant select, delete on outbox.result to outbox_app;
grant select on outbox.tally to outbox_app;
-- Housekeeping.
grant select, delete on outbox.result, outbox.tally, outbox.rate to outbox_worker;
grant select on outbox.result, outbox.tally, outbox.rate to outbox_operator;
grant select on outbox.tally, outbox.rate to outbox_reader;
grant execute on function outbox.store_results(text[], text[], float8[], boolean) to outbox_app;
grant execute on function outbox.ring(text[]) to outbox_app;
grant execute on function outbox.tally_gate(text[], boolean) to outbox_app;
grant execute on function outbox.tally_add(text, bigint, float8) to outbox_app;
grant execute on function outbox.tally_change(text, bigint, bigint, bigint, float8, bigint) to outbox_app;
grant execute on function outbox.tally_sum(text[]) to outbox_app;
grant execute on function outbox.rate_ask(text[], int[], float8[], boolean[], boolean) to outbox_app;
grant execute on function outbox.rate_forget() to outbox_actor, outbox_operator;

reset role;
