-- Purpose: forget steps that the far side has told of so long ago, and those that nobody waits for any more.
-- Locks: the rows deleted. Tables: outbox.relayed (delete), outbox.saga_void (read). Called by: workers.actor.relay.book.
delete from outbox.relayed r
 where r.heard_at < outbox.now() - make_interval(secs => %(age)s)
    or (r.verdict is null and r.relayed_at < outbox.now() - make_interval(secs => %(age)s)
        and exists (select from outbox.saga_void v where v.id = r.id and v.answered))
