-- Purpose: which of these intents are set aside now: parked, skipped, or recalled by a saga. A lane that has passed
--   them has not applied them.
-- Locks: none. Tables: outbox.parked, outbox.saga_void (read). Called by: workers.resilver.draft.
select i.id from unnest(%(ids)s::bigint[]) as i (id)
 where exists (select from outbox.parked p where p.id = i.id)
    or exists (select from outbox.saga_void v where v.id = i.id)
