-- Purpose: stop all lanes in the newest era, and wake those who wait for ticks. The first reason stays.
-- Locks: the era's row. Tables: outbox.era (update). Called by: outbox.era.halt.
with halted as (
  update outbox.era set halted = %(says)s
   where number = (select max(number) from outbox.era) and halted is null
  returning number
)
select pg_notify('outbox_tick', 'halted') from halted
