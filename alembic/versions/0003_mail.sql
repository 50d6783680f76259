-- Proofs of mail that come back by mail: the receipt recipient.

set local role outbox_owner;

---------------------------------------------------------------------- effects in two phases: mail's hold queue
-- `prepared` lies between `open` and `closed`: the evidence names something that takes effect by a release. It
-- is durable before the first try to release; a release can be repeated, so nothing in this state is in doubt.
alter table outbox.receipt
  drop constraint receipt_state_check,
  add constraint receipt_state_check check (state in ('open', 'prepared', 'partial', 'closed'));

reset role;
