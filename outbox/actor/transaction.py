"""The transaction of an actor: what it writes there is written once, because the commit acknowledges its message.

Called by `outbox.actor.broker`, for plain and for async actors. When the block ends without an error, both are durable;
else neither is. Raises `Fenced`, and rolls back, when the message is in other hands by now; `NotReady` where no
message is being run, or no sessions are known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from outbox.actor import results
from outbox.actor.delivered import Delivered
from outbox.errors import Fenced, NotReady

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from outbox.session import Outbox


class Sending(Protocol):
    """What is needed of the broker: sends in the block commit with its session."""

    outbox: Outbox | None

    #: Of an `AsyncOutbox`.
    async_sessions: Any

    def using(self, session: Session) -> AbstractContextManager[None]: ...


@contextmanager
def transaction(broker: Sending, message: Delivered | None) -> Iterator[Session]:
    """For a plain actor: in a new session of the outbox."""
    running = _running(message, "transaction")
    sessions = None if broker.outbox is None else broker.outbox.sessions
    if broker.async_sessions is not None or not callable(sessions):
        raise NotReady("the broker has no sessionmaker: make it with OutboxBroker(Outbox(sessionmaker))")
    with _ending(running):
        with sessions() as session, session.begin(), broker.using(session):
            yield session
            _acknowledge(session, running)
        running.done, running.result_stored = True, running.result is not None


@asynccontextmanager
async def atransaction(broker: Sending, message: Delivered | None, sessions: Any) -> AsyncIterator[AsyncSession]:
    """For an async actor: in a new session of `sessions`, or of the broker's `AsyncOutbox`."""
    running = _running(message, "atransaction")
    sessions = sessions or broker.async_sessions
    if sessions is None:
        raise NotReady("the broker has no async sessions: make it with OutboxBroker(AsyncOutbox(async_sessionmaker))")
    with _ending(running):
        async with sessions() as session, session.begin():
            if broker.outbox is None or broker.outbox.of(session.sync_session) is not broker.outbox:
                raise NotReady("the broker's outbox is not attached to these sessions: make it with theirs")
            with broker.using(session.sync_session):
                yield session
                await session.run_sync(_acknowledge, running)
        running.done, running.result_stored = True, running.result is not None


@contextmanager
def _ending(message: Delivered) -> Iterator[None]:
    """What was said of a result in a transaction that came to nothing is forgotten."""
    before = message.result
    try:
        yield
    except BaseException:
        message.result = before
        raise


def _running(message: Delivered | None, name: str) -> Delivered:
    if message is None:
        raise NotReady(f"no message is being run here: use broker.{name}() in an actor, in its own thread or task")
    return message


def _acknowledge(session: Session, message: Delivered) -> None:
    import psycopg  # noqa: PLC0415 - a worker without sessions doesn't load SQLAlchemy
    import sqlalchemy as sa  # noqa: PLC0415

    session.flush()
    message.in_transaction = True
    try:
        session.execute(
            sa.text("select outbox.actor_done(:id, :target, :lane, :epoch, cast(:holder as uuid))"),
            {"id": message.id, **message.hold._asdict(), "holder": message.consumer},
        )
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.Error) and error.orig.sqlstate == "OB005":
            raise Fenced("the message is in other hands by now: nothing was written") from None
        raise
    if message.result is not None:
        # It rings when it is written down that the message is done: this is an application's transaction.
        wanted = results.parameters([message.result], rings=False)
        session.execute(sa.text("select outbox.store_results(:keys, :values, :ttls, :rings)"), wanted)
