-- Purpose: how many keys of a participant are live at a tick. Reads all of the target's rows once.
-- Locks: none. Tables: outbox.horizon, outbox.word (read). Called by: outbox.live.count.
select count(*) filter (where action = 'put')
  from (select distinct on (key collate "C") action
          from outbox.word
         where target = %(target)s and action in ('put', 'delete') and parked is null and not void
           and (based and id < (select h.id from outbox.horizon h)
        or not based and outbox.shows(%(first)s, %(high)s, %(snapshot)s, xid, id))
         order by key collate "C", rank desc, id desc) as last
