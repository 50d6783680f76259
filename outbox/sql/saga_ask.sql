-- Purpose: an operator's request about a saga. Locks: none beyond an INSERT's. Tables: by outbox.saga_ask the log (insert).
-- Called by: outbox.saga.view.ask.
select outbox.saga_ask(%(saga)s, %(action)s, %(step)s, %(happened)s, %(note)s)
