-- Purpose: register a follower, or move it anywhere. In the transaction that holds the horizon.
-- Locks: the follower's row. Tables: outbox.follower (insert, update). Called by: outbox.follower.register.
insert into outbox.follower (name, tick, note) values (%(name)s, %(tick)s, %(note)s)
on conflict (name) do update set tick = excluded.tick, note = excluded.note, seen_at = excluded.seen_at
