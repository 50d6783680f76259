-- Purpose: operations that fit a filter, the newest last.
-- Locks: none. Tables: outbox.operation (read). Called by: outbox.operation.find.
select * from (
  select id, kind, request, progress, result, state, error, who, client, place,
         owner is not null and lease_until >= outbox.now() as runs, started_at, ended_at
    from outbox.operation
   where (%(id)s::bigint is null or id = %(id)s)
     and (%(kind)s::text is null or kind = %(kind)s)
     and (%(state)s::text is null or state = %(state)s)
   order by id desc limit %(limit)s) as o
 order by id
