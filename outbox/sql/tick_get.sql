-- Purpose: one tick, or the nearest ones around it if it was thinned.
-- Locks: none. Tables: outbox.tick (read). Called by: outbox.tick.around.
(select id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick where id <= %(id)s order by id desc limit 1)
union all
(select id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick where id > %(id)s order by id limit 1)
order by id
