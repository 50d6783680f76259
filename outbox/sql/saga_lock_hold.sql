-- Purpose: hold all of a saga's locks if it is the first of each of their queues. → whether it holds them now.
-- Locks: rows of outbox.saga_lock; the caller holds the advisory lock. Tables: outbox.saga_lock (update).
-- Called by: outbox.saga.locks.
with first as (
  select not exists (select from outbox.saga_lock mine join outbox.saga_lock other on other.name = mine.name
                      where mine.saga = %(saga)s and other.saga <> mine.saga and other.since < mine.since) as all_of_them
), held as (
  update outbox.saga_lock set held = true from first where saga = %(saga)s and first.all_of_them
)
select all_of_them from first
