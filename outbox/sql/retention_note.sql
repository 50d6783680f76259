-- Purpose: note where a partition is archived; anew if it was archived before and not dropped.
-- Locks: the row. Tables: outbox.archive (insert, update). Called by: outbox.retention.archive.
insert into outbox.archive as a (first, until, intents, place, name, sha256, bytes, client)
values (%(first)s, %(until)s, %(intents)s, %(place)s, %(name)s, %(sha256)s, %(bytes)s, %(client)s)
on conflict (first) do update
   set intents = excluded.intents, place = excluded.place, name = excluded.name, sha256 = excluded.sha256,
       bytes = excluded.bytes, client = excluded.client
 where a.dropped_at is null
