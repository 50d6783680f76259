-- Purpose: keys of a participant about which something was said above an id, and what was said last: words of a lower
--   rank are not the last ones any more.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.repetition.changed.
select key, max(id) from outbox.log
 where id > %(since)s and target = %(target)s and action in ('put', 'delete') and outbox.repeats(headers) is null
 group by key
