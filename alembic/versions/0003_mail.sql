-- Proofs of mail that come back by mail: the receipt recipient.

set local role outbox_owner;

---------------------------------------------------------------------- effects in two phases: mail's hold queue
-- `prepared` lies between `open` and `closed`: the evidence names something that takes effect by a release. It
-- is durable before the first try to release; a release can be repeated, so nothing in this state is in doubt.
alter table outbox.receipt
  drop constraint receipt_state_check,
  add constraint receipt_state_check check (state in ('open', 'prepared', 'partial', 'closed'));

------------------------------------------------------------------------------------------- postmarks
-- What came back to the receipt's recipient. Each mail has one recipient more, receipt+<token><part>@...; the mail
-- server brings its copy to `outbox work receipts`, which stores a row here before it says 250. A row proves that
-- the mail server took a message for all recipients of that part. It is the queue's name for the message that
-- tells a second copy (another queue_id) from a second delivery of one (the same row).
create table outbox.postmark (
  token       text        not null check (token ~ '^[0-9a-f]{32}$'),
  part        text        not null check (part ~ '^([.][0-9]{1,4}[.][0-9a-f]{1,24})?$'),
  queue_id    text        not null check (queue_id ~ '^[0-9A-Za-z._-]{0,64}$'),
  received_at timestamptz not null default outbox.now(),
  primary key (token, part, queue_id)
);
create index postmark_received on outbox.postmark (received_at);

-- Since when everything that was brought to the receipt's recipient was also taken: what is not in outbox.postmark
-- is only then perhaps not on its way. One row, once there is a server.
create table outbox.postmark_watch (
  only_row boolean     primary key default true check (only_row),
  since    timestamptz not null,
  seen_at  timestamptz not null,
  check (since <= seen_at)
);

-- Stores the postmarks of one message. Twice is once. Returns how many are new.
create function outbox.put_postmarks(tokens text[], parts text[], queue_id text) returns int
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  made int;
begin
  insert into outbox.postmark (token, part, queue_id)
    select p.token, p.part, put_postmarks.queue_id from unnest(tokens, parts) as p (token, part)
    on conflict do nothing;
  get diagnostics made = row_count;
  return made;
end $$;

-- Says that the receipt's recipient is there; `anew` if it wasn't for a while. Returns since when.
create function outbox.watch_postmarks(anew boolean) returns timestamptz
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  found_since timestamptz;
begin
  insert into outbox.postmark_watch as w (since, seen_at) values (outbox.now(), outbox.now())
    on conflict (only_row) do update
      set since = case when anew then excluded.since else least(w.since, excluded.since) end,
          seen_at = excluded.seen_at
    returning w.since into found_since;
  return found_since;
end $$;

-- Removes postmarks of more than 30 days ago, after which workers.witness doesn't rely on them. Returns how many.
create function outbox.forget_postmarks() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  gone bigint;
begin
  delete from outbox.postmark where received_at < outbox.now() - interval '30 days';
  get diagnostics gone = row_count;
  return gone;
end $$;

revoke all on outbox.postmark, outbox.postmark_watch from public;
revoke all on function outbox.put_postmarks(text[], text[], text), outbox.watch_postmarks(boolean),
  outbox.forget_postmarks() from public;
grant select on outbox.postmark, outbox.postmark_watch to outbox_worker, outbox_operator, outbox_reader;
grant execute on function outbox.put_postmarks(text[], text[], text), outbox.watch_postmarks(boolean),
  outbox.forget_postmarks() to outbox_worker;

reset role;
