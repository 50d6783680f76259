"""Writing intents in an SQLAlchemy session: rows and intents commit together, or not at all.

    outbox = Outbox(Session)                       # a sessionmaker, a Session class, or one Session
    with Session.begin() as session:
        session.add(note)
        outbox.index.put(session, f"note/{note.id}", title=note.title, text=note.text)
        blob = outbox.blobs.put(session, "photo.jpg")
        outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject="…", text="…")

What is emitted is checked at once, and inserted when its transaction ends: the session is flushed first, so that
the intents draw their ids after the rows are locked (per key, the log's order is the rows' order), then all
intents go in one statement, in the same transaction. With a SAVEPOINT:

* when one begins, what was emitted before it is inserted before it;
* when it is released, what was emitted inside is inserted inside;
* when it is rolled back, what was emitted inside is forgotten, and Postgres forgets what was inserted.

So the list kept here always belongs to the innermost transaction, and Postgres decides about everything else.
Other listeners may emit too, of a flush (mapped classes that follow their rows) or of the commit itself: the commit
flushes until nothing is left, and what comes after that is inserted at once. Once it is committed, or prepared, it is
too late, and refused.
Nothing is deleted or published when a transaction is rolled back: staged blobs are left to the sweeper, which
asks Postgres for the transaction's fate, because a session can't know it when the reply to COMMIT is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, LiteralString, cast
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from outbox import sql
from outbox.current import entered
from outbox.errors import IntentRefused, NotReady, PayloadTooLarge, UnknownTarget, WaitTimeout
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.log import append_one, append_parameters
from outbox.position import Token
from outbox.settings import Settings
from outbox.verbs import XID, BlobVerbs, IndexVerbs, MailVerbs, joined

_OUTBOX = "outbox.outbox"
_PENDING = "outbox.pending"
_ENDING = "outbox.ending"
_MODEL = "outbox.model"
_TOKEN = "outbox.token"  # noqa: S105 - a key of session.info, no secret

WAIT_EVERY = 0.005
"""Seconds between looks while waiting for a participant; doubles up to `WAIT_MOST`."""

WAIT_MOST = 0.1

FLUSHES = 100
"""How often a commit flushes what its listeners have changed again: as often as SQLAlchemy does."""

_KNOWN = sa.text("select exists (select from outbox.participant where target = :target)")


class Outbox:
    """The verbs, attached to sessions. Safe to share between threads; a session is not."""

    def __init__(self, sessions: sessionmaker[Any] | type[Session] | Session, settings: Settings | None = None) -> None:
        """Attach to a sessionmaker, a Session class or a single session.

        `settings` says where blobs are staged and what mail's domain is; by default `Settings.load()`, when needed.
        """
        self.sessions = sessions
        self._settings = settings
        self._targets: frozenset[str] = frozenset()
        self.index = IndexVerbs(self)
        self.blobs = BlobVerbs(self)
        self.mail = MailVerbs(self)
        event.listen(sessions, "before_commit", self._before_commit)
        event.listen(sessions, "after_flush_postexec", self._after_flush)
        event.listen(sessions, "after_transaction_create", self._after_create)
        event.listen(sessions, "after_transaction_end", self._after_end)

    @property
    def settings(self) -> Settings:
        """Where the participants are."""
        if self._settings is None:
            self._settings = Settings.load()
        return self._settings

    @staticmethod
    def of(session: Session) -> Outbox:
        """The outbox that is attached to a session. Raises `NotReady` if none is."""
        if not session.in_transaction():
            session.begin()
        found = session.info.get(_OUTBOX)
        if found is None:
            raise NotReady("no outbox is attached to this session: make one with Outbox(sessionmaker) first")
        return cast(Outbox, found)

    # ------------------------------------------------------------------------------------------ writing

    def emit(
        self,
        session: Session,
        target: str,
        action: str,
        key: str,
        payload: Any = None,
        *,
        due: datetime | None = None,
        saga: UUID | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Write an intent in the session's transaction; it is durable when that commits.

        Raises a kind of `IntentRefused` (payload too large or not JSON, unknown target, …) at once, and leaves
        the transaction as it was.
        """
        intent = Intent.make(
            target, action, key, {} if payload is None else payload, due=due, saga=saga, headers=headers
        )
        self._check_target(session, target)
        self.append(session, intent)

    def append(self, session: Session, intent: Intent) -> None:
        """`emit` for an intent that is made already, and whose participant is known to be registered."""
        # Not begun yet: the first statement would, but the list must belong to a transaction now.
        if not session.in_transaction():
            session.begin()
        if not session.is_active:
            raise IntentRefused(
                "the session's transaction is committed, prepared or has failed, so that nothing can be added to it: "
                "emit before the commit (a before_commit listener may), or in the next transaction"
            )
        if model := session.info.get(_MODEL):
            intent = intent.about(model)
        session.info.setdefault(_PENDING, []).append(intent)
        if _is_ending(session) and not session._flushing:  # noqa: SLF001 - else at the flush's end
            self._write_pending(session)

    @contextmanager
    def about(self, session: Session, model: object) -> Iterator[None]:
        """What the session emits inside is about rows of a mapped class, given by itself or by an instance.

        It is noted with each intent (header `model`), so that `outbox replay --model` finds blobs and mails by the
        class's name, too. Raises `IntentRefused` if it is not mapped.
        """
        mapped: Any = sa.inspect(model, raiseerr=False)
        mapper = getattr(mapped, "mapper", None)
        if mapper is None:
            name = model.__name__ if isinstance(model, type) else type(model).__name__
            raise IntentRefused(
                f"{name} is not a mapped class: give a class that SQLAlchemy maps, or an instance of one"
            )
        before = session.info.get(_MODEL)
        session.info[_MODEL] = mapper.class_.__name__
        try:
            yield
        finally:
            session.info[_MODEL] = before

    def _check_target(self, session: Session, target: str) -> None:
        if target in self._targets:
            return
        connection = session.connection()
        if connection.dialect.driver != "psycopg":
            raise NotReady(
                f"intents are written through psycopg 3, and this engine's driver is {connection.dialect.driver}: "
                "make the engine of settings.sqlalchemy_url, or of a URL that begins with postgresql+psycopg://"
            )
        joined(connection)
        # Outside of the session's own statements, so that nothing is flushed for it.
        found = connection.execute(sa.text("select target from outbox.participant where target <> 'clock'"))
        self._targets = frozenset(row[0] for row in found)
        if target not in self._targets:
            raise UnknownTarget(
                f"no participant {target!r} is registered; there are: {', '.join(sorted(self._targets))}. "
                f"Register it with select outbox.register('{target}')"
            )

    def signal(
        self, session: Session, saga: UUID, name: str, payload: Any = None, *, accepted: bool = True, who: str = ""
    ) -> None:
        """Tell a saga what its step `name` waits for, when the session's transaction commits. The payload is the step's
        result; `accepted=False` (an approval that is refused) lets the saga go back. The first signal counts."""
        self.emit(
            session, "saga", "signal", str(saga), {"name": name, "payload": payload, "accepted": accepted, "who": who}
        )

    def cancel(self, session: Session, saga: UUID, reason: str, *, who: str = "") -> None:
        """Ask a saga to go back, when the session's transaction commits. Refused once its pivot is done."""
        self.emit(session, "saga", "cancel", str(saga), {"reason": reason, "who": who})

    # ------------------------------------------------------------------------------------------- events

    def _before_commit(self, session: Session) -> None:
        # Fires for the transaction and for each SAVEPOINT; the list is the innermost one's.
        for _ in range(FLUSHES):
            self._write_pending(session)
            if session._is_clean():  # noqa: SLF001 - listeners of a flush may have changed more
                break
        session.info.setdefault(_ENDING, []).append(_innermost(session))

    def _after_flush(self, session: Session, _context: Any) -> None:
        if _is_ending(session) and session.info.get(_PENDING):
            self._insert(session, session.connection())

    def _write_pending(self, session: Session) -> None:
        """The rows, and then the intents: also those that listeners of the flush have emitted."""
        session.flush()
        if session.info.get(_PENDING):
            self._insert(session, session.connection())

    def _after_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            session.info[_OUTBOX] = self
            entered(session)
            # A token belongs to one transaction: the next one has none until it has written intents.
            session.info.pop(_TOKEN, None)
        # The SAVEPOINT itself is sent with its first statement: the parent's intents still go before it.
        if transaction.nested and session.info.get(_PENDING):
            parent = transaction.parent
            assert parent is not None  # noqa: S101 - a SAVEPOINT has a parent
            self._insert(session, parent.connection(None))

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested or transaction.parent is None:
            session.info.pop(_PENDING, None)
            if ending := [one for one in session.info.pop(_ENDING, ()) if one is not transaction]:
                session.info[_ENDING] = ending
        if transaction.parent is None:
            session.info.pop(XID, None)

    def _insert(self, session: Session, connection: sa.Connection) -> None:
        intents = session.info[_PENDING]
        if len(intents) == 1:
            self._write(session, connection, sql.load("log_append_one"), append_one(intents[0]))
        else:
            self._write(session, connection, sql.load("log_append"), append_parameters(intents))
        # Not before: a commit that is tried again after an error must not do without them.
        del session.info[_PENDING]

    @staticmethod
    def _write(session: Session, connection: sa.Connection, statement: LiteralString, parameters: Any) -> list[Any]:
        try:
            rows = _run(connection, statement, parameters)
        except sa.exc.DBAPIError as error:
            if isinstance(error.orig, psycopg.errors.CheckViolation):
                # Numbers such as 1e300 are longer in Postgres than in Python.
                raise PayloadTooLarge(
                    "a payload is over 64 KiB as Postgres prints it: stage the large part as a blob"
                ) from None
            if isinstance(error.orig, psycopg.errors.DataError):
                raise IntentRefused("Postgres can't store a payload: look for characters that are not text") from None
            raise
        hit("session.appended")
        if rows[-1][0] is not None:
            session.info[_TOKEN] = Token(*rows[-1][:2])
        return rows

    # --------------------------------------------------------------------------------- after the commit

    def token(self, session: Session) -> Token | None:
        """What the session's transaction yields once its intents are inserted, and keeps until the next one
        begins; None if it wrote none."""
        return session.info.get(_TOKEN)

    def committed(self, session: Session, token: Token) -> bool | None:
        """Whether the token's transaction committed: for when the reply to COMMIT was lost.

        None if it is still in progress. Raises `LookupError` when it is too long ago for Postgres to know.
        """
        asked = sa.text("select outbox.fate(cast(:xid as text)::xid8, :id)")
        status = session.execute(asked, {"xid": str(token.xid), "id": token.id}).scalar()
        if status is None:
            raise LookupError(f"transaction {token.xid} is too long ago for Postgres to know its outcome")
        return {"committed": True, "aborted": False}.get(str(status))

    def wait(self, session: Session, token: Token | None, target: str, *, timeout: float = 10.0) -> None:
        """Block until the participant has everything of the token's transaction (read your writes).

        Intents that were parked count as passed: `outbox status` shows them. Raises `WaitTimeout` after
        `timeout` seconds; nothing is lost then, the participant is behind or stopped.
        """
        if token is None:
            return
        deadline = time.monotonic() + timeout
        pause = WAIT_EVERY
        # A connection of its own, one statement at a time: waiting must not hold the caller's transaction open.
        engine = session.get_bind().engine
        while True:
            with engine.connect() as connection:
                if reached(connection, token, target):
                    return
            if time.monotonic() > deadline:
                raise late(target, timeout)
            time.sleep(pause)
            pause = min(WAIT_MOST, pause * 1.5)


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _is_ending(session: Session) -> bool:
    """Whether the innermost transaction is being committed, and has inserted what there was."""
    ending = session.info.get(_ENDING)
    return ending is not None and ending[-1] is _innermost(session)


def append_now(outbox: Outbox, session: Session, statement: LiteralString, parameters: tuple[Any, ...]) -> Any:
    """Write one intent at once, behind what was emitted before it: by a statement that decides whether to.
    → its row (xid, id, …); xid is None if nothing was written."""
    try:
        session._autoflush()  # noqa: SLF001 - as every query does
        if session.info.get(_PENDING):
            outbox._insert(session, session.connection())  # noqa: SLF001 - of this module
        return outbox._write(session, session.connection(), statement, parameters)[0]  # noqa: SLF001
    except sa.exc.MissingGreenlet:
        raise IntentRefused(
            "this asks the database at once, and the session is an AsyncSession: "
            "do it in await session.run_sync(lambda _: …)"
        ) from None


def reached(connection: sa.Connection, token: Token, target: str) -> bool:
    """Whether a participant has everything of the token's transaction. Raises `UnknownTarget`."""
    found = connection.execute(
        sa.text("select outbox.reached(cast(:xid as text)::xid8, :target, :id)"),
        {"xid": str(token.xid), "target": target, "id": token.id},
    ).scalar()
    if found is False and not connection.execute(_KNOWN, {"target": target}).scalar():
        raise UnknownTarget(f"no participant {target!r} is registered: nothing will ever reach it")
    return bool(found)


def late(target: str, timeout: float) -> WaitTimeout:
    """What `wait` raises after `timeout` seconds."""
    return WaitTimeout(
        f"{target} has not reached the commit within {timeout:g} s: `outbox status` shows what it waits for"
    )


def _run(connection: sa.Connection, statement: LiteralString, parameters: Any) -> list[Any]:
    """The rows of a statement that writes intents. Raises SQLAlchemy's errors, without the parameters.

    On the driver's own connection: payloads then stay out of SQLAlchemy's log (`echo`) and errors, and a transaction
    with one intent takes a tenth less time.
    """
    driver = joined(connection)
    try:
        if isinstance(driver, psycopg.AsyncConnection):
            return sa.util.await_only(_fetched(driver, statement, parameters))
        return list(driver.execute(statement, parameters))
    except psycopg.Error as error:
        adapted: Any = connection.connection.dbapi_connection
        lost = connection.dialect.is_disconnect(cast(Any, error), adapted, None)
        if lost:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            statement,
            None,
            error,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=lost,
            dialect=connection.dialect,
        ) from error


async def _fetched(driver: psycopg.AsyncConnection[Any], statement: Any, parameters: Any) -> list[Any]:
    cursor = await driver.execute(statement, parameters)
    return await cursor.fetchall()
