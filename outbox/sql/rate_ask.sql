-- Purpose: how long messages must wait for their rates before they begin. Locks: rows of outbox.rate. Tables: outbox.rate
--   (insert, update, by the function outbox.rate_ask). Called by: outbox.actor.rate.
select outbox.rate_ask(%(keys)s::text[], %(places)s::int[], %(periods)s::float8[], %(again)s::boolean[], %(begins)s)
