"""The returns: what workers of the broker tell of relayed messages, taken from the broker's return queue.

The queue belongs to one log, so that several databases can relay to one broker. An outcome is acknowledged once it is
recorded; one that comes twice does nothing the second time. Beside that, what was not heard of for long is parked.

A thread of `outbox work relay`. It ends with the process, and survives the loss of the database and of the broker.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from dramatiq.broker import MessageProxy

from outbox import era
from outbox.database import Connection, connect
from outbox.failpoint import hit
from outbox.retry import OUTAGE
from outbox.settings import Settings
from workers.actor.relay import book
from workers.actor.relay.book import Told
from workers.actor.relay.link import Link
from workers.tenure import patience

logger = logging.getLogger("outbox.actor")

AHEAD = 100
"""Outcomes that are recorded in one transaction, at most."""

QUIET = 100
"""Milliseconds without another outcome after which those that came are recorded."""

HOUSE_EVERY = 60.0
"""Seconds between looks at what was not heard of."""


def queue_of(conn: Connection) -> str:
    """The return queue of this log."""
    return f"outbox.returns.{era.identity(conn)}"


class Returns(threading.Thread):
    """Takes outcomes until told to stop."""

    def __init__(self, settings: Settings, link: Link, queue: str, stop: threading.Event) -> None:
        super().__init__(name="relay returns", daemon=True)
        self._settings = settings
        self._link = link
        self._queue = queue
        # Not `_stop`: a thread has one of its own.
        self._told_to_stop = stop
        self._house_at = -HOUSE_EVERY

    def run(self) -> None:
        failures = 0
        while not self._told_to_stop.is_set():
            consumer: Any = None
            try:
                with connect(self._settings.database, name="relay returns", patience=patience(self._settings)) as conn:
                    broker = self._link.broker()
                    consumer = broker.consume(self._queue, prefetch=AHEAD, timeout=QUIET)
                    broker.close()  # what made the queue; the consumer has a connection of its own
                    failures = 0
                    while not self._told_to_stop.is_set():
                        self._take(conn, consumer)
                        self._keep_house(conn)
            except Exception as error:  # noqa: BLE001 - the broker's library may raise anything
                logger.warning("relay: outcomes can't be taken (%s): trying again", type(error).__name__)
            finally:
                _close(consumer)
            failures += 1
            self._told_to_stop.wait(OUTAGE.wait(failures))
        self._link.close()

    def _take(self, conn: Connection, consumer: Any) -> None:
        messages: list[MessageProxy] = []
        told: list[Told] = []
        while len(messages) < AHEAD:
            message = next(consumer)
            if message is None:
                break
            one = _read(message.args)
            if one is None:
                logger.warning("relay: something in the return queue is not an outcome: it is set aside there")
                consumer.nack(message)
                continue
            messages.append(message)
            told.append(one)
        if told:
            book.hear(conn, told)
            hit("relay.heard")
            for message in messages:
                consumer.ack(message)

    def _keep_house(self, conn: Connection) -> None:
        if time.monotonic() - self._house_at < HOUSE_EVERY:
            return
        self._house_at = time.monotonic()
        if silent := book.keep_house(conn):
            logger.warning("relay: nothing was heard of %d steps of sagas: `outbox parked list`", len(silent))


def _read(args: Any) -> Told | None:
    match list(args):
        case [int(number), str(message), ("applied" | "failed") as verdict, str(error)]:
            return Told(number, message, verdict, error)
    return None


def _close(consumer: Any) -> None:
    if consumer is not None:
        try:
            consumer.close()
        except Exception as error:  # noqa: BLE001 - it is gone, one way or the other
            logger.debug("relay: %s", type(error).__name__)
