-- Purpose: say what the lane waits for, or that it drains again; and clear its count of deaths.
-- Locks: the lane row. Tables: outbox.lane (update). Called by: outbox.lane.
update outbox.lane
   set state = %(state)s, reason = %(reason)s,
       state_since = case when state = %(state)s then state_since else outbox.now() end,
       suspect = null,
       deaths = case when %(clear_deaths)s then 0 else deaths end
 where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s
returning epoch
