-- Purpose: of locks that were given back, let the head of each queue hold all of its locks if it is the head of all of
--   their queues, and tell it: by an intent, because its lane may be another engine's. One statement, whose work doesn't
--   grow with the queues. Those that waited longest are told first.
-- Locks: rows of outbox.saga_lock; the caller holds the advisory lock. Tables: outbox.saga_lock (update), outbox.log
--   (insert). Called by: outbox.saga.locks.release.
with head as (
  select distinct h.saga
    from unnest(%(names)s::text[]) as n (name)
    cross join lateral (select l.saga, l.held from outbox.saga_lock l where l.name = n.name order by l.since limit 1) as h
   where not h.held
), ready as (
  select head.saga from head
   where not exists (select from outbox.saga_lock mine
                      cross join lateral (select o.saga from outbox.saga_lock o where o.name = mine.name
                                           order by o.since limit 1) as first
                      where mine.saga = head.saga and first.saga <> mine.saga)
), held as (
  update outbox.saga_lock l set held = true from ready where l.saga = ready.saga returning l.saga, l.since
)
insert into outbox.log (target, action, key, payload)
select 'saga', 'granted', saga::text, '{}' from held group by saga order by min(since)
