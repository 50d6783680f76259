-- Purpose: declare schedules. One declaration of a name is in force: that of the process that began last, until nobody
--   has declared it for a minute. A time that has changed begins now. Written only where there is something new, or
--   where the row was not seen for a while.
-- Locks: rows of outbox.cron. Tables: outbox.cron (insert, update). Called by: workers.actor.timetable.
insert into outbox.cron as c (name, expression, timezone, missed, target, action, key, message, version, since, seen_at,
                              slot, next_at)
select d.name, d.expression, d.timezone, d.missed, d.target, d.action, d.key, d.message, d.version, %(since)s, outbox.now(), %(now)s, d.next_at
  from unnest(%(names)s::text[], %(expressions)s::text[], %(timezones)s::text[], %(misseds)s::text[], %(targets)s::text[],
              %(actions)s::text[], %(keys)s::text[], %(messages)s::jsonb[], %(versions)s::text[], %(nexts)s::timestamptz[])
    as d (name, expression, timezone, missed, target, action, key, message, version, next_at)
 order by d.name
on conflict (name) do update
   set expression = excluded.expression, timezone = excluded.timezone, missed = excluded.missed, target = excluded.target,
       action = excluded.action, key = excluded.key, message = excluded.message, version = excluded.version, since = greatest(c.since, excluded.since),
       seen_at = excluded.seen_at,
       slot = case when (c.expression, c.timezone) = (excluded.expression, excluded.timezone) then c.slot else excluded.slot end,
       next_at = case when (c.expression, c.timezone) = (excluded.expression, excluded.timezone) then c.next_at else excluded.next_at end
 where case when c.version = excluded.version then c.seen_at < excluded.seen_at - interval '10 seconds'
            else c.since < excluded.since or c.seen_at < excluded.seen_at - interval '1 minute' end
