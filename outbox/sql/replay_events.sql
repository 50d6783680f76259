-- Purpose: events that were applied and that a replay is about, in order of id: what is no put and no delete. With the
--   receipt, which says whether a mail went out and to whom. What is a repetition itself is left out.
-- Locks: none. Tables: outbox.word, outbox.receipt (read). Called by: outbox.replay.
select w.id, w.key, w.action, w.payload::text, coalesce(r.state = 'closed', false), coalesce(r.evidence, '{}')
  from outbox.word w left join outbox.receipt r on r.id = w.id
 where w.target = %(target)s and w.id > %(after)s and w.action not in ('put', 'delete') and w.id = w.rank
   and w.parked is null and not w.void
   and /* chosen */
 order by w.id limit %(limit)s
