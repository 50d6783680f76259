"""Outcomes: at a worker of RabbitMQ or Redis, what tells the log what became of a relayed message.

    broker = RabbitmqBroker(url=…)
    broker.add_middleware(Outcomes())                        # by the broker's own return queue
    broker.add_middleware(Outcomes("postgresql://app@db/shop"))  # straight to Postgres, where it can be reached

Without it, relayed messages are worked all the same. With it, the saga of a step hears when the step's actor is done,
or is given up; and any other message that is given up is parked, as if it had been worked beside the log.

It is told before the message is acknowledged: while that can't be done, the message is not acknowledged, and dramatiq
tries again. A worker that dies in between has the message again, and it is told twice, of which the log takes the
first.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Literal

import dramatiq
from dramatiq.broker import MessageProxy
from dramatiq.common import q_name
from dramatiq.errors import BrokerConnectionError, BrokerError
from dramatiq.middleware import Middleware, MiddlewareError

from outbox import sql
from outbox.actor.delivered import failure_of
from outbox.actor.sender import Sender

logger = logging.getLogger("outbox.actor")

OPTION = "outbox"
"""The option of a relayed message that says which intent it is: {intent, returns, step}."""

RETURNED = "outbox_outcome"
"""The name of the actor that a returned outcome is addressed to. There is none: the relay reads the queue itself."""

_RAN = "_outbox_ran"


class Unsent(MiddlewareError, BrokerConnectionError):
    """What became of a message couldn't be told: dramatiq doesn't acknowledge it yet, and tries again."""

    def __init__(self, intent: object) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # dramatiq's base has no types
            f"what became of intent {intent} can't be told just now: its message stays unacknowledged"
        )


class Outcomes(Middleware):
    """Tells the log what became of relayed messages. `database`: None: by the broker."""

    def __init__(self, database: str | None = None) -> None:
        self._sender = None if database is None else Sender(lambda: database)
        self._broker: dramatiq.Broker | None = None
        self._lock = threading.Lock()
        self._thread = threading.local()

    # ---------------------------------------------------------------------------------- dramatiq's signals

    def before_process_message(self, _broker: dramatiq.Broker, _message: MessageProxy) -> None:
        self._thread.resent = None

    def after_enqueue(self, _broker: dramatiq.Broker, message: Any, _delay: int | None) -> None:
        self._thread.resent = message.message_id

    def after_process_message(
        self,
        _broker: dramatiq.Broker,
        message: MessageProxy,
        *,
        result: Any = None,  # noqa: ARG002 - dramatiq's signature
        exception: BaseException | None = None,
    ) -> None:
        setattr(message, _RAN, failure_of(message.actor_name, exception) if exception else "")

    def after_skip_message(self, _broker: dramatiq.Broker, message: MessageProxy) -> None:
        setattr(message, _RAN, "")

    def before_ack(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        ran = message.__dict__.get(_RAN)
        if ran is None:
            return  # it was only delayed
        if not ran:
            self._tell(broker, message, "applied", "")
        elif getattr(self._thread, "resent", None) != message.message_id:
            # Either nothing retries it, or its retry could not be sent, and dramatiq hides that.
            self._tell(broker, message, "failed", ran)

    def before_nack(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        error = message.__dict__.get(_RAN) or failure_of(message.actor_name, message._exception)  # noqa: SLF001
        self._tell(broker, message, "failed", error)

    # ------------------------------------------------------------------------------------------- telling

    def _tell(
        self, broker: dramatiq.Broker, message: MessageProxy, verdict: Literal["applied", "failed"], error: str
    ) -> None:
        told = message.options.get(OPTION)
        if not isinstance(told, dict) or (verdict == "applied" and not told.get("step")):
            return
        intent = told.get("intent")
        try:
            if self._sender is not None:
                parameters = {
                    "ids": [intent],
                    "messages": [message.message_id],
                    "verdicts": [verdict],
                    "errors": [error],
                }
                self._sender.run(lambda conn: conn.execute(sql.load("relay_told"), parameters))
            else:
                outcome: dramatiq.Message[Any] = dramatiq.Message(
                    queue_name=q_name(str(told["returns"])),
                    actor_name=RETURNED,
                    args=(intent, message.message_id, verdict, error),
                    kwargs={},
                    options={},
                )
                self._returning(broker).enqueue(outcome)
        except Exception as problem:
            if not isinstance(problem, BrokerError):
                logger.warning("what became of intent %s can't be told (%s)", intent, type(problem).__name__)
            raise Unsent(intent) from problem

    def _returning(self, broker: dramatiq.Broker) -> dramatiq.Broker:
        """A broker like the worker's own, that waits for confirmations; with no middleware, so that no worker takes the
        return queue for one of its own."""
        with self._lock:
            if self._broker is None:
                self._broker = _like(broker)
            return self._broker


def _like(broker: Any) -> dramatiq.Broker:
    if hasattr(broker, "namespace"):
        from dramatiq.brokers.redis import RedisBroker  # noqa: PLC0415 - only one of the two is installed

        return RedisBroker(client=broker.client, namespace=broker.namespace, middleware=[])
    from dramatiq.brokers.rabbitmq import RabbitmqBroker  # noqa: PLC0415

    made = RabbitmqBroker(confirm_delivery=True, middleware=[])
    made.parameters = broker.parameters
    return made
