-- What operators do with parked intents, and the audit trail of it.

set local role outbox_owner;

reset role;
