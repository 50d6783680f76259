-- Purpose: whether this user may append repetitions. Locks: none. Tables: the catalog. Called by: outbox.repetition.check.
select has_function_privilege(p.oid, 'execute') from pg_proc p
 where p.pronamespace = 'outbox'::regnamespace and p.proname = 'repeat'
