"""The verbs of an `Outbox`, by participant: what is put, deleted, sent.

Made by `outbox.session`; each checks what it is given, stages what is too large for the log, and emits an intent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.blob import Blob, Inline, Staged
from outbox.document import document
from outbox.errors import IntentRefused
from outbox.message import message_payload, message_payload_from
from outbox.source import Bytes, Source
from outbox.store import Store, open_store

if TYPE_CHECKING:
    from outbox.session import Outbox

XID = "outbox.xid"
"""Where a session keeps its transaction's id, once it was asked for."""


def joined(connection: sa.Connection) -> Any:
    """The driver's connection behind a session's, if what is written there commits with the session's rows."""
    driver: Any = connection.connection.driver_connection
    if driver.autocommit:
        raise IntentRefused(
            "the session's connection is in autocommit mode, where each statement commits by itself, and no intent "
            "with its rows: give the session an engine or a connection whose isolation level is not AUTOCOMMIT"
        )
    return driver


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
        self.staging = Staging(outbox)

    @property
    def store(self) -> Store:
        """Where the blobs are, for reading: `outbox.blobs.store.open(blob.digest)`."""
        return self.staging.store

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
        return publish(self._outbox, session, self._made(session, source, size), name=name, type=type)

    def stage(self, session: Session, source: Bytes, *, size: int | None = None, name: str = "") -> dict[str, Any]:
        """Store a file's bytes for a saga to publish, as `put` without its intent. → JSON for the saga's input, which a
        step gives to `run.blobs.put`. They stay until the saga has ended."""
        return dict(self._made(session, source, size).payload(name=name))

    def delete(self, session: Session, digest: str) -> None:
        """Remove a blob. Others may name the same content: that is for the application to know."""
        self._outbox.emit(session, "blob", "delete", digest, {"digest": digest})

    def _made(self, session: Session, source: Bytes, size: int | None) -> Staged | Inline:
        with Source(source, size=size) as content:
            staging = self.staging
            return staging.inline(content) or staging.store.stage(content, **staging.owner(session))


class Staging:
    """What brings bytes into the store, or into the intent, before there is an intent."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._store: Store | None = None
        self._log: str | None = None

    @property
    def store(self) -> Store:
        """The application's store."""
        if self._store is None:
            self._store = open_store(self._outbox.settings)
        return self._store

    def inline(self, content: Source) -> Inline | None:
        """The bytes themselves, if they are few enough for the intent."""
        small = content.whole(self._outbox.settings.blob_inline)
        return None if small is None else Inline(content.digest, content.size, small)

    def owner(self, session: Session) -> dict[str, Any]:
        """Whose fate is that of the staged bytes: the session's transaction, and its log. Asked once for each."""
        if not session.in_transaction():
            session.begin()
        xid = session.info.get(XID)
        if xid is None:
            joined(session.connection())
            xid = int(session.connection().execute(sa.text("select pg_current_xact_id()::text")).scalar_one())
            session.info[XID] = xid
        if self._log is None:
            self._log = str(session.connection().execute(sa.text("select log from outbox.identity")).scalar_one())
        return {"xid": int(xid), "log": self._log}


def publish(outbox: Outbox, session: Session, made: Staged | Inline, *, name: str = "", type: str = "") -> Blob:  # noqa: A002 - as in `BlobVerbs.put`
    """Emit the intent that publishes bytes which are staged, or travel in it."""
    outbox.emit(session, "blob", "put", made.digest, made.payload(name=name, type=type))
    return Blob(made.digest, made.size)


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
