-- Purpose: store results, and wake those who wait for them. Locks: rows of outbox.result. Tables: outbox.result (insert,
--   update, by the function outbox.store_results). Called by: outbox.actor.results, for actors in the transaction that
--   acknowledges their messages.
select outbox.store_results(%(keys)s, %(values)s, %(ttls)s, %(rings)s)
