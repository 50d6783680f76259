-- Purpose: what operators did, the newest last.
-- Locks: none. Tables: outbox.audit (read). Called by: outbox.audit.find.
select * from (
  select id, at, who, client, action, intent, target, reason, error, note
    from outbox.audit
   where (%(intent)s::bigint is null or intent = %(intent)s)
     and (%(target)s::text is null or target = %(target)s)
     and (%(action)s::text is null or action = %(action)s)
     and (%(who)s::text is null or who = %(who)s)
     and (%(since)s::float8 is null or at > outbox.now() - make_interval(secs => %(since)s))
   order by id desc
   limit %(limit)s
) as newest order by id
