-- Purpose: become the owner of a lane that is free, whose lease has run out, or whose owner is known to be
--   dead (`dead`: the caller has seen that its process is gone). Raises the epoch. Counts deaths: an owner
--   that went away without releasing, with a batch in hand, and without moving the position (unless the caller is itself that owner,
--   back after it had lost the database). A row that is locked is an owner's who is writing: nothing is waited for,
--   because an owner that was cut off in a transaction holds it until the server's patience is over.
-- Locks: the lane row. Tables: outbox.lane (update), outbox.participant, outbox.position (read).
-- Called by: outbox.lane.claim.
with prior as (
  select * from outbox.lane
   where target = %(target)s and lane = %(lane)s
     and (owner is null or lease_until < outbox.now() or owner = %(dead)s::uuid)
     for update skip locked
), stand as (
  select coalesce(max(seq), 0) as seq from outbox.position where target = %(target)s and lane = %(lane)s
)
update outbox.lane l
   set epoch = l.epoch + 1, owner = %(owner)s, place = %(place)s,
       lease_until = outbox.now() + make_interval(secs => %(ttl)s),
       deaths = case when prior.owner is null or not %(count_death)s then prior.deaths
                     when prior.deaths_seq <> stand.seq or prior.suspect is null then greatest(prior.deaths, 1)
                     else least(prior.deaths + 1, 1000) end,
       suspect = null,
       deaths_seq = stand.seq,
       state = 'draining', reason = null, state_since = outbox.now()
  from prior, stand, outbox.participant p
 where l.target = prior.target and l.lane = prior.lane and p.target = prior.target
returning l.epoch, l.slot_low, l.slot_high, l.deaths, prior.owner is not null as unclean, p.lanes, p.generation
