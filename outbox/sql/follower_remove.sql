-- Purpose: forget a follower. Locks: its row. Tables: outbox.follower (delete). Called by: outbox.follower.remove.
delete from outbox.follower where name = %(name)s returning name
