-- Purpose: record attempts before they are made. Those that are closed already don't come back: their effect
--   is done, and must not be made again. One that is prepared stays so: it is to be released, whoever does it.
-- Locks: rows of outbox.receipt; the lane row (share). Tables: outbox.receipt (insert, update), outbox.lane (lock),
--   outbox.log, outbox.base, outbox.horizon (read).
-- Called by: outbox.receipt.opened.
with fence as (
  select from outbox.lane where target = %(target)s and lane = %(lane)s and epoch = %(epoch)s for share
)
insert into outbox.receipt as r (id, target, slot, state, epoch)
select l.id, l.target, l.slot, 'open', %(epoch)s
  from fence, (select id, target, slot from outbox.log where id = any(%(ids)s)
               union all
               select id, target, slot from outbox.base
                where id = any(%(ids)s) and id < (select h.id from outbox.horizon h)) as l
on conflict (id) do update
   set state = case r.state when 'prepared' then 'prepared' else 'open' end,
       attempts = r.attempts + 1, epoch = excluded.epoch, opened_at = excluded.opened_at, adopted = false
 where r.state <> 'closed'
returning r.id, r.evidence
