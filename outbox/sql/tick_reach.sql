-- Purpose: the last tick of a tick's era; from that one, the first tick of the next era.
-- Locks: none. Tables: outbox.tick (read). Called by: outbox.tick.reach.
select id, floor, low, high, snapshot, nonce, at, first
  from ((select 1 as choice, id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick
          where first = %(first)s and id > %(id)s order by id desc limit 1)
        union all
        (select 2, id, floor, low, high, snapshot::text, nonce, at, first from outbox.tick
          where id > %(id)s order by id limit 1)) as next
 order by choice limit 1
