-- Purpose: tell a saga that it holds its locks now: an intent, because its lane may be another engine's.
-- Locks: none beyond an INSERT's. Tables: outbox.log (insert). Called by: outbox.saga.locks.release.
insert into outbox.log (target, action, key, payload) values ('saga', 'granted', %(saga)s, '{}')
