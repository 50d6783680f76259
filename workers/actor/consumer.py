"""The consumer: what dramatiq's worker iterates over, and gives messages back to.

It holds nothing: dramatiq makes a new one when it likes, and that one takes back what the old one has given out. `ack`,
`nack` and `requeue` return at once; what they say is durable a few milliseconds later (`workers.actor.ledger`), and if
this process dies before, the message comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import dramatiq
from dramatiq.broker import MessageProxy
from dramatiq.middleware import Retries

from outbox.actor.delivered import Delivered
from workers.actor.channel import Channel

logger = logging.getLogger("outbox.actor")


class Said(Enum):
    """What became of a message."""

    DONE = "done"
    RETRY = "retry"
    DEAD = "dead"
    #: Not begun: it goes back.
    BACK = "back"
    #: Not begun, because it is over its rate limit: it is parked until its time comes.
    WAIT = "wait"


class Consumer(dramatiq.Consumer):
    """One queue, for as long as dramatiq likes."""

    def __init__(
        self,
        channel: Channel,
        timeout: float,
        settle: Callable[[Delivered, Said], None],
        close: Callable[[Channel], None],
        middleware: Iterable[Any],
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        self._settle = settle
        self._close = close
        self._retries = any(isinstance(one, Retries) for one in middleware)

    def __next__(self) -> Delivered | None:
        return self._channel.get(self._timeout)

    def ack(self, message: MessageProxy) -> None:
        """It was run; perhaps it failed, and is to be run again."""
        assert isinstance(message, Delivered)  # noqa: S101 - what was given out comes back
        if message.wait is not None:
            self._settle(message, Said.WAIT)
        elif message.done:
            # Its actor has acknowledged it, with what it wrote; whatever came after that can't take it back.
            self._settle(message, Said.DONE)
        elif message.retry is not None:
            self._settle(message, Said.RETRY)
        elif message._exception is not None and self._retries:  # noqa: SLF001 - dramatiq has no other word for it
            # Somebody was to send it again, and that went wrong where dramatiq hides it. It must not be lost.
            self._settle(message, Said.RETRY)
        else:
            self._settle(message, Said.DONE)

    def nack(self, message: MessageProxy) -> None:
        """It has failed for good: an operator decides."""
        assert isinstance(message, Delivered)  # noqa: S101
        self._settle(message, Said.DONE if message.done else Said.DEAD)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """They were never begun."""
        for message in messages:
            assert isinstance(message, Delivered)  # noqa: S101
            self._settle(message, Said.BACK)

    def close(self) -> None:
        self._close(self._channel)
