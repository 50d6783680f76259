-- Purpose: whether any parked intent's time has come, without locking or writing anything: a lane looks several
--   times a second. Those that killed a worker are kept apart, to be tried alone.
-- Locks: none. Tables: outbox.parked (read). Called by: outbox.parked.take.
select coalesce(bool_or(deaths = 0), false) as plain, coalesce(bool_or(deaths > 0), false) as deadly
  from (select deaths from outbox.parked
         where target = %(target)s and slot between %(slot_low)s and %(slot_high)s and retry_at <= outbox.now()
         order by deaths limit 1000) as ready
