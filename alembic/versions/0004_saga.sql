-- Sagas: their steps, and what is to be undone.

set local role outbox_owner;

reset role;
