-- Proofs of mail that come back by mail: the receipt recipient.

set local role outbox_owner;

reset role;
