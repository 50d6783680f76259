-- Counting: a number, or a rate, that housekeeping removes at the same moment.
--
-- Both functions (0011) see to it that the key has a row, and then lock it. Where that row had run out, housekeeping may
-- remove it in between, or while they wait for its lock: they found none, and what they counted was written nowhere. A
-- mutex had two holders, and twice as many messages began as a rate allows. Now they make the row again.
--
-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.

set local role outbox_owner;

-- Changes a number, 0 if it isn't there, unless it would leave its bounds (null: none). → whether it did.
-- `party`: a message that is done; it changes a number once.
create or replace function outbox.tally_change(key text, delta bigint, low bigint, high bigint, ttl float8, party bigint)
returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  old  outbox.tally;
  gone boolean;
begin
  perform outbox.tally_gate(array[tally_change.key], false);
  loop
    insert into outbox.tally (key, value, expires_at) values (tally_change.key, 0, '-infinity')
      on conflict on constraint tally_pkey do nothing;
    select t.* into old from outbox.tally t where t.key = tally_change.key for update;
    exit when found;  -- else housekeeping has just removed it
  end loop;
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

-- How long messages must wait before they may begin: 0, or seconds, each at its place in the arrays. `begins`: those that
-- need not wait begin now, and that counts; otherwise nothing counts, and it is a good guess. `again`: was told a time
-- before, and that has come; it is told the next place that comes free, others the end of the queue.
create or replace function outbox.rate_ask(keys text[], places int[], periods float8[], again boolean[], begins boolean)
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
    loop
      insert into outbox.rate (key, places, period, expires_at)
        values (asked.key, asked.places, asked.period, '-infinity') on conflict do nothing;
      select r.* into mine from outbox.rate r
       where r.key = asked.key and r.places = asked.places and r.period = asked.period for update;
      exit when found;  -- else housekeeping has just removed it
    end loop;
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

reset role;
