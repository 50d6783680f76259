-- Purpose: keys of a participant about which something was said above an id: what is repeated about them is old.
-- Locks: none. Tables: outbox.log (read). Called by: outbox.repetition.changed.
select distinct key from outbox.log
 where id > %(since)s and target = %(target)s and action in ('put', 'delete') and outbox.repeats(headers) is null
