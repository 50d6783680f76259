"""The wire: one connection to RabbitMQ on which messages are published and confirmed, many at a time.

It lives in a thread of its own, which answers heartbeats also while the lane has nothing to do. A wire that broke is
done with: `workers.actor.relay.rabbit` makes a new one. Every message is persistent and `mandatory`: one that no
queue takes comes back instead of being dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import pika
import pika.exceptions

from workers.actor.relay.link import CONFIRM_WITHIN, Letter

HANG_UP_WITHIN = 3.0
"""Seconds to say goodbye: a RabbitMQ that blocks publishers doesn't hear it."""


class Answer(Enum):
    """What RabbitMQ says of a message."""

    ACK = "ack"
    NACK = "nack"
    #: There is no such queue.
    RETURNED = "returned"


class Wire:
    """A connection with one channel in confirm mode. Used by one thread, besides its own."""

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        self._changed = threading.Condition()
        #: What was published and not taken out by `wait`: intent → its answer, or None.
        self._answers: dict[int, Answer | None] = {}
        #: What was published, by RabbitMQ's count on this channel.
        self._tags: dict[int, int] = {}
        self._published = 0
        self._ready = False
        self._blocked = False
        #: What broke it.
        self.broken: BaseException | None = None
        self._channel: Any = None
        self._connection: Any = pika.SelectConnection(
            parameters,
            on_open_callback=self._opened,
            on_open_error_callback=lambda _connection, error: self._break(error),
            on_close_callback=lambda _connection, error: self._break(error),
        )
        self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- the lane's thread

    def open(self) -> bool:
        """Wait until it can be used. → whether it can."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self.broken, CONFIRM_WITHIN)
            return self._ready and not self.broken

    @property
    def is_blocked(self) -> bool:
        """Whether RabbitMQ takes nothing at the moment, because its memory or its disk is low."""
        return self._blocked and self.broken is None

    def publish(self, letters: Sequence[Letter]) -> None:
        """Send those that are not on their way already."""
        with self._changed:
            fresh = [letter for letter in letters if letter.id not in self._answers]
            self._answers.update((letter.id, None) for letter in fresh)
        if fresh:
            self._call(lambda: self._publish(fresh))

    def wait(self, letters: Sequence[Letter]) -> list[Answer]:
        """The answers, in order, up to the first that doesn't come: then the wire is broken or blocked, or too slow."""
        deadline = time.monotonic() + CONFIRM_WITHIN
        with self._changed:
            while not self.broken and not self._blocked and not all(self._answers.get(one.id) for one in letters):
                if not self._changed.wait(deadline - time.monotonic()):
                    break
            found: list[Answer] = []
            for letter in letters:
                answer = self._answers.get(letter.id)
                if answer is None:
                    break
                found.append(answer)
                del self._answers[letter.id]
            return found

    def close(self) -> None:
        """Hang up. What is not confirmed is nobody's any more."""
        self._call(self._hang_up)
        self._thread.join(HANG_UP_WITHIN)

    # ------------------------------------------------------------------------------ the wire's thread

    def _call(self, work: Any) -> None:
        try:
            self._connection.ioloop.add_callback_threadsafe(work)
        except Exception as error:  # noqa: BLE001 - the loop is closed
            self._break(error)

    def _run(self) -> None:
        try:
            self._connection.ioloop.start()
        except Exception as error:  # noqa: BLE001 - whatever it was, the lane must hear of it
            self._break(error)
        finally:
            # A broker that is away for long must not cost a descriptor for each try.
            with suppress(Exception):
                self._connection.ioloop.close()

    def _opened(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(lambda _connection, _method: self._block(blocked=True))
        connection.add_on_connection_unblocked_callback(lambda _connection, _method: self._block(blocked=False))
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(lambda _channel, error: self._break(error))
        channel.add_on_return_callback(self._returned)
        channel.confirm_delivery(self._confirmed, callback=self._confirming)

    def _confirming(self, _frame: Any) -> None:
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def _block(self, *, blocked: bool) -> None:
        with self._changed:
            self._blocked = blocked
            self._changed.notify_all()

    def _publish(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            if self.broken:
                return
            self._published += 1
            self._tags[self._published] = letter.id
            properties = pika.BasicProperties(
                delivery_mode=2, priority=letter.priority, message_id=letter.name, correlation_id=str(letter.id)
            )
            try:
                self._channel.basic_publish("", letter.queue, letter.body, properties, mandatory=True)
            except Exception as error:  # noqa: BLE001 - it is closed
                self._break(error)

    def _returned(self, _channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        # Its confirmation follows.
        with self._changed:
            self._answers[int(properties.correlation_id)] = Answer.RETURNED

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag
        tags = [tag for tag in self._tags if tag <= last] if method.multiple else [last]
        answer = Answer.ACK if isinstance(method, pika.spec.Basic.Ack) else Answer.NACK
        with self._changed:
            for number in [self._tags.pop(tag) for tag in tags if tag in self._tags]:
                if self._answers.get(number) is not Answer.RETURNED:
                    self._answers[number] = answer
            self._changed.notify_all()

    def _hang_up(self) -> None:
        if self._connection.is_open:
            self._connection.close()
        else:
            self._connection.ioloop.stop()

    def _break(self, error: BaseException) -> None:
        with self._changed:
            self.broken = self.broken or error
            self._changed.notify_all()
        if isinstance(error, pika.exceptions.ChannelClosed) and self._connection.is_open:
            self._connection.close()
        elif not self._connection.is_open:
            self._connection.ioloop.stop()
