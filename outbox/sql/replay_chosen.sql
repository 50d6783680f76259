-- Purpose: which rows of outbox.word (alias w) a replay is about: a condition that other statements contain.
-- Locks: none. Tables: none. Called by: outbox.replay, outbox.repetition.
        (%(key)s::text is null or w.key = %(key)s)
    and (%(key_prefix)s::text is null or starts_with(w.key, %(key_prefix)s))
    and (%(model)s::text is null or w.headers ->> 'model' = %(model)s or starts_with(w.key, %(model)s || '/'))
    and (%(keys)s::text[] is null or w.key = any(%(keys)s))
    and (%(saga)s::uuid is null or w.saga = %(saga)s)
    and (%(begin)s::timestamptz is null or w.created_at >= %(begin)s)
    and (%(end)s::timestamptz is null or w.created_at < %(end)s)
    and (%(seen)s::text is null or not w.based and not outbox.shows(
          %(seen_first)s::bigint, %(seen_high)s::bigint, %(seen)s::pg_snapshot, w.xid, w.id))
    and (%(upto)s::text is null or w.based or outbox.shows(
          %(upto_first)s::bigint, %(upto_high)s::bigint, %(upto)s::pg_snapshot, w.xid, w.id))
