-- Purpose: append repetitions in the transaction of the operation's progress. Locks: the operation's row (share).
-- Tables: outbox.operation, outbox.base (read), outbox.log (read, insert). Called by: outbox.repetition.append.
select pg_current_xact_id()::text::bigint,
       array(select outbox.repeat(%(operation)s, %(epoch)s, %(target)s, %(ids)s::bigint[], %(sinces)s::bigint[],
                                  %(anew)s, %(keys)s::text[], %(actions)s::text[], %(payloads)s::jsonb[]))
