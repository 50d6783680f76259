"""The broker: dramatiq's side of the log.

    broker = OutboxBroker(outbox)
    dramatiq.set_broker(broker)

    with Session.begin() as session:
        session.add(order)
        confirm.send(order.id)      # an actor: commits with the order, or not at all

* A send inside a transaction of an attached session commits with it; outside of one it is durable when it returns.
* A delay is a time in the log, and nothing waits in a worker's memory.
* Workers are dramatiq's own (`dramatiq module`); what they do with the log is in `workers.actor`.
* `with broker.transaction() as session:` in an actor acknowledges the message in that transaction: what the actor
  writes there is written once. In an async actor: `async with broker.atransaction() as session:`.

Raises dramatiq's errors: `QueueNotFound`, `QueueJoinTimeout`, `ConnectionFailed`, `ConnectionClosed`; and ours for
messages that don't fit the log (`PayloadTooLarge`, `PayloadInvalid`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import dramatiq
from dramatiq.common import current_millis, q_name
from dramatiq.errors import BrokerConnectionError, QueueNotFound
from dramatiq.middleware import Middleware, SkipMessage

from outbox.actor import cron, queue, rate, results, turn, unique
from outbox.actor.delivered import FINISHING, Delivered
from outbox.actor.letter import due_of, intent_of, target_of
from outbox.actor.sender import Sender
from outbox.actor.signals import Signals
from outbox.actor.transaction import atransaction, transaction
from outbox.database import Connection
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.retry import OUTAGE
from outbox.saga.run import Action
from outbox.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from outbox.aio import AsyncOutbox
    from outbox.session import Outbox

LANES = 4
"""Lanes of a new queue: as many processes as can take part in it. Each costs a query for every tick."""

MISSING = 40
"""How often a message is put back whose actor isn't there: some half an hour, with growing pauses. In a rolling
deployment another worker may have it, or the next one."""

#: The message that the running actor was given.
_MESSAGE: ContextVar[Delivered | None] = ContextVar("outbox_message", default=None)

_Value = TypeVar("_Value")

#: The session that `using` names.
_USED: ContextVar[Session | None] = ContextVar("outbox_used", default=None)


class OutboxBroker(dramatiq.Broker):
    """A broker whose messages lie in the log. Making one connects to nothing."""

    def __init__(
        self,
        outbox: Outbox | AsyncOutbox | None = None,
        *,
        settings: Settings | None = None,
        worker: Settings | None = None,
        lanes: int = LANES,
        missing: int = MISSING,
        middleware: list[Middleware] | None = None,
    ) -> None:
        """`outbox`: whose sessions sends commit with; None: every send is a transaction of its own.

        `settings`: what the application connects as (by default the outbox's, or `Settings.load()`). `worker`: what
        the workers connect as, a member of outbox_actor (by default `settings`, or what OUTBOX_ACTOR_DATABASE names).
        `lanes`: of queues that are new. `missing`: how often a message is put back whose actor a worker doesn't have.
        """
        self._signals = Signals(self)
        super().__init__(middleware)
        self.actor_options |= turn.OPTIONS | rate.OPTIONS | unique.OPTIONS | cron.OPTIONS
        self.rates = rate.Rates()
        #: The one that sends commit with; of an `AsyncOutbox`, the plain one behind it.
        behind: Any = outbox
        self.outbox: Outbox | None = getattr(behind, "sync", behind)
        self.async_sessions: Any = None if behind is self.outbox else behind.sessions
        self.lanes = lanes
        self.missing = missing
        self._settings = settings
        self._worker = worker or settings
        self._known: set[str] = set()
        self._sender = Sender(lambda: self.settings.database)
        self._books = Sender(lambda: self.worker_settings.database)
        self._delivery: Any = None
        self._timetable: Any = None
        self._consuming = threading.Lock()

    @property
    def settings(self) -> Settings:
        """What the application connects as."""
        if self._settings is None:
            self._settings = self.outbox.settings if self.outbox is not None else Settings.load()
        return self._settings

    @property
    def worker_settings(self) -> Settings:
        """What the workers connect as."""
        if self._worker is None:
            self._worker = Settings.load(role="actor")
        return self._worker

    # ------------------------------------------------------------------------------------------ actors

    def declare_actor(self, actor: dramatiq.Actor[Any, Any]) -> None:
        """Make an actor known in this process. Raises `IntentRefused`, `ValueError` for options that make no sense."""
        turn.check(actor)
        self.rates.declare(actor)
        unique.check(actor.options, actor.actor_name)
        cron.check(actor, self.actors)
        super().declare_actor(actor)

    def schedules(self) -> list[cron.Schedule]:
        """The schedules of the declared actors."""
        return [schedule for actor in list(self.actors.values()) for schedule in cron.schedules(actor)]

    # ------------------------------------------------------------------------------------------ queues

    def declare_queue(self, queue_name: str) -> None:
        """Make a queue known in this process. The database hears of it when it is first used."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues[queue_name] = target_of(queue_name)
            self.emit_after("declare_queue", queue_name)

    def _target(self, queue_name: str) -> str:
        try:
            return str(self.queues[q_name(queue_name)])
        except KeyError:
            raise QueueNotFound(queue_name) from None

    def registered(self, queue_name: str) -> str:
        """The participant of a declared queue, known to the database. Raises `QueueNotFound`."""
        target = self._target(queue_name)
        if target not in self._known:
            self._sender.run(lambda conn: queue.declare(conn, target, self.lanes))
            self._known.add(target)
        return target

    def flush(self, queue_name: str) -> None:
        """Drop all messages of a queue: waiting, delayed, and dead.

        What runs goes on, and isn't acknowledged; so may what other processes have fetched.
        """
        target = self.registered(queue_name)
        self._books.run(lambda conn: queue.flush(conn, target))
        if self._delivery is not None:
            self._delivery.doubt(target)

    def flush_all(self) -> None:
        """Drop all messages of all declared queues."""
        for name in list(self.queues):
            self.flush(name)

    def join(self, queue_name: str, *, timeout: int | None = None) -> None:
        """Wait until a queue is done: nothing waits, runs, or is to be retried. For tests. `timeout`: milliseconds.

        Raises `QueueJoinTimeout`, `QueueNotFound`.
        """
        target = self.registered(queue_name)
        self._sender.run(lambda conn: queue.join(conn, target, None if timeout is None else timeout / 1000))

    def close(self) -> None:
        """Close the connections of this process."""
        self._sender.close()
        self._books.close()

    # ----------------------------------------------------------------------------------------- sending

    def enqueue(self, message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        """Write a message into the log: with the session's transaction, if there is one. `delay`: milliseconds.

        → the message, or a `Duplicate` if it is unique and one of its key is pending.
        """
        if isinstance(message, Delivered):
            return self._again(message, delay)
        return self._enqueue(message, delay, None)[0]

    def enqueue_on(self, conn: Connection, message: dramatiq.Message[Any]) -> tuple[dramatiq.Message[Any], int]:
        """Write a message in a connection's transaction. → as `enqueue`, and the id of its intent."""
        return self._enqueue(message, None, conn)

    def _enqueue(
        self, message: dramatiq.Message[Any], delay: int | None, conn: Connection | None
    ) -> tuple[dramatiq.Message[Any], int]:
        target = self.registered(message.queue_name)
        if delay is not None:
            message = message.copy(options={"eta": current_millis() + delay})
        message = self._ready(message)
        self.emit_before("enqueue", message, delay)
        message, number = self._write(message, conn)
        self.logger.debug("Message %s goes to %s.", message.message_id, target)
        self.emit_after("enqueue", message, delay)
        return message, number

    def _write(self, message: dramatiq.Message[Any], conn: Connection | None) -> tuple[dramatiq.Message[Any], int]:
        """Into the log. → the message, or what has its key; and the intent's id, 0 if that is drawn at the commit."""
        intent = intent_of(message, turn=self._turn(message), due=due_of(message))
        session = None if conn is not None else self.session()
        statement, parameters = unique.statement(message, intent)
        if session is not None and self.outbox is not None:
            if not unique.is_unique(message):
                self.outbox.append(session, intent)
                return message, 0
            from outbox.session import append_now  # noqa: PLC0415 - loaded by whoever has a session

            row = append_now(self.outbox, session, statement, parameters)
        elif conn is not None:
            row = conn.execute(statement, parameters).fetchone()
        else:
            row = self._sender.run(lambda own: own.execute(statement, parameters).fetchone())
        return unique.outcome(message, row), row[1]

    def _turn(self, message: dramatiq.Message[Any]) -> turn.Turn | None:
        return turn.turn_of(message, self.actors.get(message.actor_name))

    def _ready(self, message: dramatiq.Message[Any]) -> dramatiq.Message[Any]:
        """With the options that follow from its arguments. Raises `IntentRefused` for one that can't be meant."""
        actor = self.actors.get(message.actor_name)
        return unique.settle(self.rates.stamped(actor, message.copy(queue_name=q_name(message.queue_name))), actor)

    def _again(self, message: Delivered, delay: int | None) -> dramatiq.Message[Any]:
        """A message that is in hand is to be run again: the same intent is parked, when it is acknowledged."""
        wait = max(0, delay or 0)
        again: dramatiq.Message[Any] = message.copy(options={"eta": current_millis() + wait})
        if message.done:
            # Its actor has acknowledged it, and failed after that: this was its only try, and who waits hears of it.
            message.fail()
            return again
        self.emit_before("enqueue", message, delay)
        message.retry = wait / 1000
        self.emit_after("enqueue", message, delay)
        return again

    def draft(self, message: dramatiq.Message[Any]) -> Intent:
        """The intent that a message would become, if it were sent."""
        message = self._ready(message)
        return intent_of(message, turn=self._turn(message))

    def action(self, message: dramatiq.Message[Any]) -> Action:
        """What a step of a saga returns to have an actor run: `return broker.action(charge.message(run.input.order))`.

        The step is done when the actor is, and has failed when its message is given up. Its result is the message's id.
        """
        self.registered(message.queue_name)
        draft = self.draft(message)
        unique.refuse_step(draft)
        return Action(draft, {"message_id": message.message_id})

    # ---------------------------------------------------------------------------------------- sessions

    def session(self) -> Session | None:
        """The session that a send commits with now. Raises `IntentRefused` if several are in a transaction here."""
        used = _USED.get()
        if used is not None or self.outbox is None:
            return used
        from outbox.current import current  # noqa: PLC0415 - a worker without sessions doesn't load SQLAlchemy

        return current(lambda session: self.outbox is not None and self.outbox.of(session) is self.outbox)

    def run(self, work: Callable[[Connection], _Value]) -> _Value:
        """`work` on a connection of the application's user in autocommit mode, outside of all sessions.

        Raises dramatiq's `ConnectionFailed`, and `ConnectionClosed` when nobody knows whether it was done.
        """
        return self._sender.run(work)

    @contextmanager
    def using(self, session: Session) -> Iterator[None]:
        """Sends in this block commit with `session`, whatever other sessions there are."""
        token = _USED.set(session)
        try:
            yield
        finally:
            _USED.reset(token)

    def transaction(self) -> AbstractContextManager[Session]:
        """In an actor: a new session, whose commit at the end of the block acknowledges the message.

        What is written in it is written once, however often the message is delivered. Whatever the actor does after
        the block is done at most once. Raises `Fenced`, and rolls back, when the message is in other hands by now.
        """
        return transaction(self, _MESSAGE.get())

    def result(self, value: Any) -> None:
        """In `broker.transaction()`: what the message's result is. It is stored by the same commit.

        What the actor returns after the block counts for nothing then. Raises `RuntimeError` when the broker has no
        `Results` with a backend of its own.
        """
        message = _running()
        message.result = None
        results.tell(self, message, value)

    def atransaction(self, sessions: Any = None) -> AbstractAsyncContextManager[AsyncSession]:
        """The same in an async actor: `async with broker.atransaction() as session`.

        `sessions`: an `async_sessionmaker` that the broker's outbox is attached to; by default its `AsyncOutbox`'s.
        """
        return atransaction(self, _MESSAGE.get(), sessions)

    # --------------------------------------------------------------------------------------- consuming

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> dramatiq.Consumer:
        """What a worker iterates over. Needs the extra `workers`. Raises `QueueNotFound`, `NotReady`."""
        target = self._target(queue_name)
        # dramatiq has a thread for each queue, and they come here at the same time.
        with self._consuming:
            if self._delivery is None:
                self._delivery = self._worker_side("delivery")
        consumer: dramatiq.Consumer = self._delivery.consumer(q_name(queue_name), target, prefetch, timeout)
        return consumer

    def _worker_side(self, name: str) -> Any:
        points = entry_points(group="outbox.actor", name=name)
        if not points:
            raise NotReady("the workers are not installed: pip install 'postgres-outbox[workers,dramatiq]'")
        return next(iter(points)).load()(self)

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        message = args[0] if args else None
        if isinstance(message, Delivered):
            if signal == "process_message":
                self._begin(message)
            elif signal == "nack":
                results.fail(self, message)
            if not message.begun:
                return
        elif signal == "worker_shutdown":
            if self._timetable is not None:
                self._timetable.stop()
                self._timetable = None
            if self._delivery is not None:
                self._delivery.leave()
        self._signals.before(signal, args, kwargs)

    def _begin(self, message: Delivered) -> None:
        _MESSAGE.set(message)
        message.broker = self
        if not message.mine():
            message.stale = True
            raise SkipMessage("it is in other hands by now")
        if self.rates:
            try:
                wait = self.run(lambda conn: self.rates.waits(conn, [message], self.actors, begins=True))
            except BrokerConnectionError:
                wait = {message.id: OUTAGE.first}
            message.wait = wait.get(message.id)
            if message.wait is not None:
                raise SkipMessage("it is over its rate limit")

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        message = args[0] if args else None
        if isinstance(message, Delivered):
            ends = signal in ("process_message", "skip_message")
            token = FINISHING.set(message) if ends else None
            try:
                if message.begun:
                    self._signals.after(signal, args, kwargs)
            finally:
                if token is not None:
                    FINISHING.reset(token)
                    _MESSAGE.set(None)
            return
        self._signals.after(signal, args, kwargs)
        if signal == "worker_boot" and self._timetable is None and self.schedules():
            self._timetable = self._worker_side("timetable")
            self._timetable.start()


def _running() -> Delivered:
    message = _MESSAGE.get()
    if message is None:
        raise NotReady("no message is being run here: use broker.transaction() in an actor, in its own thread")
    return message
