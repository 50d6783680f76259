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
Nothing is deleted or published when a transaction is rolled back: staged blobs are left to the sweeper, which
asks Postgres for the transaction's fate, because a session can't know it when the reply to COMMIT is lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.message import EmailMessage
from typing import Any, Literal, cast
from uuid import UUID, uuid4

import psycopg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox import sql
from outbox.blob import Blob, Inline, Staged
from outbox.current import entered
from outbox.document import document
from outbox.errors import IntentRefused, NotReady, PayloadTooLarge, UnknownTarget, WaitTimeout
from outbox.failpoint import hit
from outbox.heard import Sessions, heard
from outbox.intent import Intent
from outbox.log import append_one, append_parameters
from outbox.message import message_payload, message_payload_from
from outbox.position import Token
from outbox.settings import Settings
from outbox.source import Bytes, Source
from outbox.store import Store, open_store

_OUTBOX = "outbox.outbox"
_PENDING = "outbox.pending"
_TOKEN = "outbox.token"  # noqa: S105 - a key of session.info, no secret
_XID = "outbox.xid"

WAIT_EVERY = 0.005
"""Seconds between looks while waiting for a participant; doubles up to `WAIT_MOST`."""

WAIT_MOST = 0.1

_KNOWN = sa.text("select exists (select from outbox.participant where target = :target)")


class Outbox:
    """The verbs, attached to sessions. Safe to share between threads; a session is not."""

    def __init__(self, sessions: Sessions, settings: Settings | None = None) -> None:
        """Attach to a sessionmaker, an async_sessionmaker, a Session class or a single session.

        `settings` says where blobs are staged and what mail's domain is; by default `Settings.load()`, when needed.
        """
        self.sessions = sessions
        self._settings = settings
        self._targets: frozenset[str] = frozenset()
        self.index = IndexVerbs(self)
        self.blobs = BlobVerbs(self)
        self.mail = MailVerbs(self)
        source = heard(sessions)
        event.listen(source, "before_commit", self._before_commit)
        event.listen(source, "after_transaction_create", self._after_create)
        event.listen(source, "after_transaction_end", self._after_end)

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

    @staticmethod
    def append(session: Session, intent: Intent) -> None:
        """`emit` for an intent that is made already, and whose participant is known to be registered."""
        # Not begun yet: the first statement would, but the list must belong to a transaction now.
        if not session.in_transaction():
            session.begin()
        session.info.setdefault(_PENDING, []).append(intent)

    def _check_target(self, session: Session, target: str) -> None:
        if target in self._targets:
            return
        connection = session.connection()
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
        if session.info.get(_PENDING):
            session.flush()
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
        if transaction.parent is None:
            session.info.pop(_XID, None)

    def _insert(self, session: Session, connection: sa.Connection) -> None:
        try:
            rows = _append(connection, session.info.pop(_PENDING))
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
        session.info[_TOKEN] = Token(*rows[-1])

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
                reached = connection.execute(
                    sa.text("select outbox.reached(cast(:xid as text)::xid8, :target, :id)"),
                    {"xid": str(token.xid), "target": target, "id": token.id},
                ).scalar()
                if reached is False and not connection.execute(_KNOWN, {"target": target}).scalar():
                    raise UnknownTarget(f"no participant {target!r} is registered: nothing will ever reach it")
            if reached:
                return
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"{target} has not reached the commit within {timeout:g} s: `outbox status` shows what it waits for"
                )
            time.sleep(pause)
            pause = min(WAIT_MOST, pause * 1.5)


def _append(connection: sa.Connection, intents: Sequence[Intent]) -> Sequence[Any]:
    """All intents in one statement. → (xid, id) of each. Raises SQLAlchemy's errors, without the parameters.

    On the driver's own connection: payloads then stay out of SQLAlchemy's log (`echo`) and errors, and a transaction
    with one intent takes a tenth less time.
    """
    driver: Any = connection.connection.dbapi_connection
    one = len(intents) == 1
    statement = sql.load("log_append_one" if one else "log_append")
    try:
        return list(driver.execute(statement, append_one(intents[0]) if one else append_parameters(intents)))
    except psycopg.Error as error:
        lost = connection.dialect.is_disconnect(cast(Any, error), driver, None)
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


class IndexVerbs:
    """`outbox.index`: what is found by searching."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def put(
        self,
        session: Session,
        key: str,
        *,
        title: str = "",
        text: str = "",
        keywords: Mapping[str, str | Sequence[str]] | None = None,
        data: dict[str, Any] | None = None,
        language: str = "en",
    ) -> None:
        """Make the document of `key` searchable, in place of an earlier one.

        `keywords` are exact values to filter by (`folder:photos`); `data` is stored and comes back with a hit.
        """
        made = document(title=title, text=text, keywords=keywords, data=data, language=language)
        self._outbox.emit(session, "index", "put", key, made)

    def delete(self, session: Session, key: str) -> None:
        """Remove the document of `key`, if there is one."""
        self._outbox.emit(session, "index", "delete", key)


class BlobVerbs:
    """`outbox.blobs`: files of any size, named by what is in them."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._store: Store | None = None
        self._log: str | None = None

    @property
    def store(self) -> Store:
        """Where the blobs are, for reading: `outbox.blobs.store.open(blob.digest)`."""
        if self._store is None:
            self._store = open_store(self._outbox.settings)
        return self._store

    def put(
        self,
        session: Session,
        source: Bytes,
        *,
        size: int | None = None,
        name: str = "",
        type: str = "",  # noqa: A002 - the word that users know from HTTP
    ) -> Blob:
        """Store a file's bytes; they can be read once the transaction has committed and the worker has been there.

        The bytes are streamed into the store's staging folder and are durable there when this returns; the
        commit decides whether they are published. Small ones travel in the intent (OUTBOX_BLOB_INLINE). `size`,
        if given, must be right. Raises `BlobRefused`.
        """
        made = self._made(session, source, size)
        self._outbox.emit(session, "blob", "put", made.digest, made.payload(name=name, type=type))
        return Blob(made.digest, made.size)

    def stage(self, session: Session, source: Bytes, *, size: int | None = None, name: str = "") -> dict[str, Any]:
        """Store a file's bytes for a saga to publish, as `put` without its intent. → JSON for the saga's input, which a
        step gives to `run.blobs.put`. They stay until the saga has ended."""
        return dict(self._made(session, source, size).payload(name=name))

    def _made(self, session: Session, source: Bytes, size: int | None) -> Staged | Inline:
        with Source(source, size=size) as content:
            small = content.whole(self._outbox.settings.blob_inline)
            if small is not None:
                return Inline(content.digest, content.size, small)
            return self.store.stage(content, xid=self._xid(session), log=self._identity(session))

    def delete(self, session: Session, digest: str) -> None:
        """Remove a blob. Others may name the same content: that is for the application to know."""
        self._outbox.emit(session, "blob", "delete", digest, {"digest": digest})

    def _xid(self, session: Session) -> int:
        """The transaction that the staged bytes belong to: its fate is theirs. Asked once a transaction."""
        if not session.in_transaction():
            session.begin()
        xid = session.info.get(_XID)
        if xid is None:
            xid = int(session.connection().execute(sa.text("select pg_current_xact_id()::text")).scalar_one())
            session.info[_XID] = xid
        return int(xid)

    def _identity(self, session: Session) -> str:
        if self._log is None:
            self._log = str(session.connection().execute(sa.text("select log from outbox.identity")).scalar_one())
        return self._log


class MailVerbs:
    """`outbox.mail`: mail that is sent if, and only if, the transaction commits."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def send(
        self,
        session: Session,
        message: EmailMessage | None = None,
        *,
        key: str | None = None,
        in_doubt: Literal["resend", "hold", "drop"] = "resend",
        **parts: Any,
    ) -> str:
        """Send a mail: an `EmailMessage`, or `sender`, `to`, `subject`, `text` and so on. → its Message-ID.

        Rendered now, with Message-ID and Date, so that every try is the same byte for byte. Mails of one `key`
        go out in order; by default each is its own. `in_doubt` says what to do when nothing can tell whether
        a try got through. Raises `AddressInvalid`.
        """
        domain = self._outbox.settings.mail_domain
        made = (
            message_payload(domain=domain, in_doubt=in_doubt, **parts)
            if message is None
            else message_payload_from(message, domain=domain, in_doubt=in_doubt, **parts)
        )
        self._outbox.emit(session, "mail", "send", key or str(uuid4()), made)
        return str(made["message_id"])
