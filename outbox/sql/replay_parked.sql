-- Purpose: intents that were set aside and that a replay is about, in order of id, if they would be their key's last
--   word: nothing newer was written, and they were not repeated before.
-- Locks: none. Tables: outbox.word (read). Called by: outbox.replay.
select w.id, w.key, w.action, w.parked
  from outbox.word w
 where w.target = %(target)s and w.id > %(after)s and w.parked = any(%(reasons)s) and w.action in ('put', 'delete')
   and not exists (select from outbox.word n
                    where n.target = %(target)s and n.key = w.key and n.action in ('put', 'delete') and not n.void
                      and n.parked is distinct from 'skipped' and n.id <> w.id and n.rank >= w.rank)
   and /* chosen */
 order by w.id limit %(limit)s
