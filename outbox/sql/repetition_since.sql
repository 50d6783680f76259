-- Purpose: an id that every intent is above which this moment doesn't show: the floor of the newest tick whose
--   transactions have all ended. A transaction that runs for long makes it old, never wrong.
-- Locks: none. Tables: outbox.tick, outbox.era (read). Called by: outbox.repetition.since.
select coalesce((select floor from outbox.tick
                  where first = (select max(e.first) from outbox.era e)
                    and pg_snapshot_xmax(snapshot) <= pg_snapshot_xmin(pg_current_snapshot())
                  order by id desc limit 1), 0)
