"""Calls the functions of steps: the only place where the engine runs an application's code.

A function step runs in the engine's transaction, in a savepoint of its own, with an SQLAlchemy session: what it wrote
is kept if it succeeds and gone if it fails. The session's intents (`outbox.index.put(session, …)`) are written too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import traceback
from collections.abc import Callable, Coroutine
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from outbox.errors import OutboxError, Permanent
from outbox.intent import Intent, payload_text
from outbox.saga.definition import Step
from outbox.saga.plan import Kind
from outbox.saga.run import Action, BlobMaker, IndexMaker, MailMaker, Run
from outbox.saga.states import Verdict
from outbox.saga.store import Record
from outbox.session import Outbox
from outbox.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger("outbox.saga")

_USED = "outbox.saga.used"
_ENDS = "outbox.saga.ends"

_CHECK = """
savepoint outbox_check;
set constraints all immediate;
rollback to savepoint outbox_check;
release savepoint outbox_check
"""
# What would fail at the engine's COMMIT must fail here, where it takes nobody else along. The rollback gives the
# constraints back the mode that they had; they are checked once more at the COMMIT.


LOCK_LIMIT = 512
"""Bytes of a lock's name; the schema checks it."""


class Came(NamedTuple):
    """What a function came to."""

    verdict: Verdict
    result: Any = None
    error: str = ""


class Stepwork:
    """The application's functions, on the engine's connection."""

    def __init__(self, connection: sa.Connection, settings: Settings) -> None:
        class StepSession(Session):
            """A class of its own, so that the events below are nobody else's."""

        self._sessions = sessionmaker(connection, class_=StepSession, join_transaction_mode="create_savepoint")
        Outbox(self._sessions, settings)
        event.listen(self._sessions, "after_begin", _note_use)
        event.listen(self._sessions, "before_commit", _refuse_commit)
        self._connection = connection
        self._targets: set[str] = set()
        self._unused: Session | None = None
        self._index, self._blobs, self._mail = IndexMaker(), BlobMaker(), MailMaker(settings.mail_domain)

    def given(self, record: Record) -> Run[Any]:
        """What the functions of this saga are given now."""
        if record.given is None:
            record.given = record.definition.read(json.loads(record.body))
        nodes = record.definition.plan.nodes
        results = {node.name: result for node, result in zip(nodes, record.results, strict=True) if result is not None}
        return Run(record.id, record.given, results, record.state.reason, self._index, self._blobs, self._mail)

    def function(self, record: Record, step: Step, *, undo: bool) -> Came:
        """Call a function step, or a compensation that is one."""
        function = step.undo_function if undo else step.do
        assert function is not None  # noqa: S101 - the linter saw to it
        session = self._unused or self._sessions()
        self._unused = None
        try:
            given = self.given(record)
            result = _awaited(function, session, given) if _is_async(function) else function(session, given)
            if not undo and result is not None:
                payload_text(result)
            if not session.in_transaction() and not session.info:
                # Untouched, and good for the next one: a session costs as much as the rest of such a step.
                self._unused = session
                return Came(Verdict.APPLIED, result)
            _commit(session)
        except Exception as error:  # noqa: BLE001 - it is the application's, and may raise anything
            session.rollback()
            return _judge(error, record, step)
        finally:
            if self._unused is not session:
                session.close()
        return Came(Verdict.APPLIED, result)

    def intent(self, record: Record, step: Step, *, undo: bool) -> Came:
        """The intent of a step, as the result of APPLIED: an `Action`."""
        function = step.undo_function if undo else step.do
        assert function is not None  # noqa: S101 - as above
        try:
            made = function(self.given(record))
            if not isinstance(made, Action) or not isinstance(made.intent, Intent):
                raise Permanent(f"step {step.name!r} returned no intent: return what a maker of run made")  # noqa: TRY301
            before = step.node.kind is Kind.COMPENSATABLE and not undo
            if before and (made.intent.target, made.intent.action) == ("mail", "send"):
                # What the linter says of `.mail`; of a plain intent step it can't know.
                raise Permanent(f"step {step.name!r} would send a mail before the pivot: declare it with .mail")  # noqa: TRY301
            payload_text(made.result)
            self._check_target(made.intent.target)
        except Exception as error:  # noqa: BLE001 - as above
            return _judge(error, record, step)
        return Came(Verdict.APPLIED, made)

    def locks(self, record: Record) -> list[str]:
        """The names that this saga locks, in order. Raises `Permanent`, or what the application's function does."""
        named = record.definition.locks
        names = () if named is None else named(self.given(record).input)
        if isinstance(names, str):
            raise Permanent("locks= returned one text: return a list of names")
        found = sorted(set(names))
        for name in found:
            if not isinstance(name, str) or not 0 < len(name.encode()) <= LOCK_LIMIT or "\x00" in name:
                raise Permanent(f"locks= returned what is no name: use text of 1 to {LOCK_LIMIT} bytes without NUL")
        return found

    def _check_target(self, target: str) -> None:
        """Nobody would ever read an intent for a participant that isn't there, and its saga would wait for ever."""
        if target not in self._targets:
            rows = self._connection.exec_driver_sql("select target from outbox.participant")
            self._targets = {row[0] for row in rows}
        if target not in self._targets:
            raise Permanent(f"there is no participant {target!r}: correct the name, or see `outbox register`")

    def payload(self, record: Record, step: Step) -> Came:
        """The payload that starts a child, as the result of APPLIED."""
        assert step.do is not None  # noqa: S101 - as above
        assert step.child is not None  # noqa: S101 - as above
        try:
            return Came(Verdict.APPLIED, step.child.payload(step.do(self.given(record))))
        except Exception as error:  # noqa: BLE001 - as above
            return _judge(error, record, step)


# Asked for each step of each saga.
_is_async = cache(inspect.iscoroutinefunction)


def _awaited(
    function: Callable[[AsyncSession, Run[Any]], Coroutine[Any, Any, Any]], session: Session, run: Run[Any]
) -> Any:
    """What an async function comes to, in a loop of its own: nothing that it has begun goes on after it.

    Its session is this one behind SQLAlchemy's facade. The connection stays the engine's, which isn't an async one:
    each statement is waited for, as in a plain function.
    """
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 - needs greenlet, which few installations need

    made: Any = lambda **_: session  # noqa: E731 - in place of a class
    facade = AsyncSession(sync_session_class=made)
    try:
        return asyncio.run(function(facade, run))
    except asyncio.CancelledError as error:
        raise RuntimeError("the step cancelled itself") from error


def _note_use(session: Session, _transaction: SessionTransaction, _connection: sa.Connection) -> None:
    session.info[_USED] = True


def _refuse_commit(session: Session) -> None:
    if not session.in_nested_transaction() and not session.info.get(_ENDS):
        raise Permanent("a step's function may not commit: what it wrote is committed with the step's outcome")


def _commit(session: Session) -> None:
    if not session.in_transaction():
        return  # the function has ended it by itself
    session.flush()
    session.info[_ENDS] = True
    if not session.info.get(_USED):
        session.commit()
        return
    driver: Any = session.connection().connection.dbapi_connection
    driver.execute(_CHECK)
    session.commit()


def _judge(error: Exception, record: Record, step: Step) -> Came:
    """What an exception means: `Permanent` is final, the loss of the database is not the step's fault."""
    if isinstance(error, sa.exc.DBAPIError):
        if error.connection_invalidated and isinstance(error.orig, psycopg.Error):
            raise error.orig
        text = f"{type(error.orig).__name__}: see the engine's log"
    elif isinstance(error, OutboxError):
        text = str(error)
    else:
        text = f"it raised {type(error).__name__}: see the engine's log"
    if not isinstance(error, OutboxError):
        # Where, but not the message: it may quote data.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        logger.warning(
            "saga %s: step %s raised %s at %s:%s",
            record.id, step.name, type(error).__name__, frame.filename, frame.lineno,
        )  # fmt: skip
    # Postgres stores neither NUL nor lone surrogates, and the engine's whole batch would fail with them.
    text = text.replace("\x00", "?").encode("utf-8", "replace").decode()
    return Came(Verdict.FAILED if isinstance(error, Permanent) else Verdict.AGAIN, error=text)
