-- Purpose: store a tick and tell the readers, in one transaction of its own. The statement's snapshot is
--   taken first, the sequence (`high`) is read after it, in the way that tick_poll.sql explains. No row comes back if the
--   epoch is stale, or if the era is over: halted, or the server has gone on with another history under our connection (a
--   failover behind a pooler).
-- Locks: the clock's lane row (share), until commit; the sequence, as nextval() does. Tables: outbox.tick (insert), outbox.lane (lock), outbox.era.
-- Called by: outbox.tick.take.
with fence as (
  select from outbox.lane
   where target = 'clock' and lane = 0 and epoch = %(epoch)s and outbox.goes_on() for share
), taken as (
  insert into outbox.tick (id, floor, low, high, snapshot, nonce, first)
  select last.id + 1, last.low, %(low)s, coalesce(pg_sequence_last_value('outbox.log_id'), 0),
         pg_current_snapshot(), %(nonce)s, last.first
    from fence, (select id, low, first from outbox.tick order by id desc limit 1) as last
  returning id, floor, low, high, snapshot::text, nonce, at, first
)
select taken.*, pg_notify('outbox_tick', id::text) from taken
