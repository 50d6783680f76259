"""RabbitMQ as the broker that messages are relayed to: dramatiq's queues, with publisher confirms.

A message counts as handed on when RabbitMQ has confirmed it: it is on the disk of a durable queue then (of most
replicas of a quorum queue). A queue that isn't there is made as dramatiq makes it; one that is there is left as it
is, so that its kind, its priorities and its limits are its workers' affair.

While RabbitMQ blocks publishers (its disk or its memory is low), nothing more is sent, and what was sent last stays
on its way: it isn't sent twice for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import dramatiq
import pika
import pika.exceptions
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.errors import ConnectionClosed

from outbox.errors import NotReady, Unavailable
from workers.actor.relay.address import Address
from workers.actor.relay.link import Fate, Letter
from workers.actor.relay.wire import Answer, Wire

_PRECONDITION = 406
"""What RabbitMQ closes a channel with for a message that is too large."""


class Rabbit:
    """A link to RabbitMQ."""

    def __init__(self, address: Address, *, max_priority: int | None = None) -> None:
        self._url = address.url
        self._max_priority = max_priority
        try:
            self._parameters = pika.URLParameters(address.url)
        except (ValueError, TypeError):
            raise NotReady(
                "the address of RabbitMQ has something behind the host that is not understood: correct OUTBOX_RELAY"
            ) from None
        if address.tls:
            self._parameters.ssl_options = pika.SSLOptions(address.context(), address.host)
        self._wire: Wire | None = None

    def send(self, letters: Sequence[Letter]) -> list[Fate]:
        answers = self._publish(letters)
        if any(answer is Answer.RETURNED for answer in answers):
            missing = [i for i, answer in enumerate(answers) if answer is Answer.RETURNED]
            self._declare({letters[i].queue for i in missing})
            again = self._publish([letters[i] for i in missing])
            for i, answer in zip(missing, again, strict=False):
                answers[i] = answer
            # One that is still nowhere ends the batch.
            answers = answers[: next((i for i in missing if answers[i] is Answer.RETURNED), len(answers))]
            if not answers:
                raise Unavailable("RabbitMQ has no queue for a message, and it can't be made: start a worker there")
        fates = [Fate.TAKEN if answer is Answer.ACK else Fate.FULL for answer in answers]
        if len(fates) == len(letters) or not self._too_large():
            return fates
        # One of those without an answer is too large, and the channel is gone with it.
        self._wire = None
        rest = letters[len(fates) :]
        if len(rest) == 1:
            return [*fates, Fate.REFUSED]
        for letter in rest:
            try:
                one = self.send([letter])
            except Unavailable:
                break
            fates += one
            if not one:
                break
        return fates

    def _publish(self, letters: Sequence[Letter]) -> list[Answer]:
        """The answers; fewer if RabbitMQ goes away in the middle. Raises `Unavailable`."""
        wire = self._opened()
        if wire.is_blocked:
            raise Unavailable(_BLOCKED)
        wire.publish(letters)
        answers = wire.wait(letters)
        if len(answers) < len(letters) and not self._too_large():
            blocked = wire.is_blocked
            if not blocked:
                # Too slow is as good as gone: whether it has them, only a new connection can tell.
                self.close()
            if not answers:
                raise Unavailable(_BLOCKED if blocked else f"RabbitMQ has gone away{_why(wire.broken)}")
        return answers

    def _opened(self) -> Wire:
        if self._wire is not None and self._wire.broken:
            self._wire = None
        if self._wire is None:
            wire = Wire(self._parameters)
            if not wire.open():
                wire.close()
                raise Unavailable(_refusal(wire.broken))
            self._wire = wire
        return self._wire

    def _too_large(self) -> bool:
        broken = None if self._wire is None else self._wire.broken
        return isinstance(broken, pika.exceptions.ChannelClosedByBroker) and broken.reply_code == _PRECONDITION

    def _declare(self, queues: set[str]) -> None:
        broker = self.broker()
        try:
            for queue in sorted(queues):
                broker.declare_queue(queue, ensure=True)
        except (ConnectionClosed, pika.exceptions.AMQPError) as error:
            raise Unavailable(
                f"RabbitMQ doesn't let a queue be made{_why(error.__cause__ or error)}: start a worker there first"
            ) from None
        finally:
            broker.close()

    def broker(self) -> RabbitmqBroker:
        broker = RabbitmqBroker(
            url=self._url,
            confirm_delivery=True,
            max_priority=self._max_priority,
            middleware=list[dramatiq.Middleware](),
        )
        broker.parameters = self._parameters
        return broker

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


_BLOCKED = "RabbitMQ takes no messages at the moment: its disk or its memory is low"


def _refusal(error: BaseException | None) -> str:
    if isinstance(error, pika.exceptions.ProbableAuthenticationError | pika.exceptions.AuthenticationError):
        return "RabbitMQ doesn't let us in: correct user and password in OUTBOX_RELAY"
    if isinstance(error, pika.exceptions.ProbableAccessDeniedError):
        return "RabbitMQ doesn't let us into that virtual host: correct OUTBOX_RELAY, or the permissions there"
    return f"RabbitMQ can't be reached{_why(error)}"


def _why(error: BaseException | None) -> str:
    """The kind of an error, and RabbitMQ's code: its text may quote addresses and names."""
    if error is None:
        return ""
    code = getattr(error, "reply_code", None)
    return f" ({type(error).__name__}{'' if code is None else f' {code}'})"
