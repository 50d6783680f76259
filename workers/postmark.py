"""Postmarks: what proves that a mail server took a mail, without access to its host.

Each mail has one recipient more, the *receipt's recipient* `receipt+<token><part>@example.org`. A mail server that
takes the message takes it for all its recipients, in one queue file; it brings that one's copy to `workers.lmtp`,
which stores a row of `outbox.postmark`. `workers.witness` reads them to decide attempts in doubt.

`Postmarks.put` is durable when it returns. It raises `psycopg.Error` or `Unreachable`, and then nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from outbox import sql
from outbox.database import Unreachable, connect
from outbox.errors import AddressInvalid, NotReady
from outbox.failpoint import hit
from outbox.message import message_address

_LOCAL_LIMIT = 9
"""Characters before the +, so that token and part fit behind it into the 64 of a local part."""

_TAG = re.compile(r"(?P<token>[0-9a-f]{32})(?P<part>(?:\.[0-9]{1,4}\.[0-9a-f]{1,24})?)")


class Postmark(NamedTuple):
    """Which mail, and for which of its recipients (a part of `workers.envelope`)."""

    token: str
    part: str


class ReceiptAddress(NamedTuple):
    """The receipt's recipient, without what follows the +."""

    local: str
    domain: str

    @classmethod
    def read(cls, address: str) -> ReceiptAddress:
        """From the setting `receipt:ADDRESS`. Raises `NotReady`."""
        try:
            local, _, domain = message_address(address, "OUTBOX_MAIL_EVIDENCE").rpartition("@")
        except AddressInvalid as error:
            raise NotReady(str(error)) from None
        if "+" in local or not local.isascii() or len(local) > _LOCAL_LIMIT:
            raise NotReady(
                f"OUTBOX_MAIL_EVIDENCE: the receipt's recipient has more than {_LOCAL_LIMIT} characters before the @, "
                "or a + there: write it like receipt:receipt@example.org"
            )
        return cls(local, domain.lower())

    def of(self, token: str, part: str) -> str:
        """The recipient of one part of a mail."""
        return f"{self.local}+{token}{part}@{self.domain}"

    def match(self, address: str) -> Postmark | None:
        """What an address stands for, or None if it isn't one of ours."""
        local, _, domain = address.rpartition("@")
        name, _, tag = local.partition("+")
        found = _TAG.fullmatch(tag)
        if found is None or name.lower() != self.local.lower() or domain.lower() != self.domain:
            return None
        return Postmark(found["token"], found["part"])


class Watch(NamedTuple):
    """How far one can rely on what is *not* among the postmarks."""

    #: Since when all that was brought was taken; None if nobody ever listened.
    since: datetime | None
    seen_at: datetime | None
    now: datetime


class Postmarks:
    """The postmarks in Postgres, over one connection that is made anew when it is lost. Not thread-safe."""

    def __init__(self, database: str, name: str) -> None:
        self._database, self._name = database, name
        self._conn: psycopg.Connection[Any] | None = None
        #: Something that was brought was not taken since the last word about it. Until that is on record, a
        #: postmark that is missing means nothing.
        self.gap = True

    def _connected(self) -> psycopg.Connection[Any]:
        if self._conn is None or self._conn.closed:
            self._conn = connect(self._database, name=self._name)
        return self._conn

    def close(self) -> None:
        """Let go of the connection."""
        if self._conn is not None:
            with suppress(psycopg.Error):
                self._conn.close()
        self._conn = None

    def put(self, postmarks: Sequence[Postmark], queue_id: str) -> None:
        """Store the postmarks of one message; stored before, it stays as it is."""
        try:
            self._put(postmarks, queue_id)
        except (psycopg.OperationalError, psycopg.InterfaceError):
            # Perhaps only this connection is gone, as after a restart. Twice is once.
            self.close()
            self._put(postmarks, queue_id)
        hit("receipt.stored")

    def _put(self, postmarks: Sequence[Postmark], queue_id: str) -> None:
        if self.gap:
            # On record before what was brought after it: whoever finds that knows of the gap.
            self.watch()
        self._connected().execute(
            sql.load("postmark_put"),
            {"tokens": [p.token for p in postmarks], "parts": [p.part for p in postmarks], "queue_id": queue_id},
        )

    def watch(self) -> None:
        """Say that somebody listens, and whether anything was missed."""
        self._connected().execute("select outbox.watch_postmarks(%s)", (self.gap,))
        self.gap = False

    def forget(self) -> None:
        """Remove those that nobody relies on any more."""
        self._connected().execute("select outbox.forget_postmarks()")

    def find(self, tokens: Sequence[str]) -> list[tuple[str, str, str]]:
        """Token, part and queue id of what came back of these mails."""
        return self._connected().execute(sql.load("postmark_find"), {"tokens": list(tokens)}).fetchall()

    def watched(self) -> Watch:
        """How far one can rely on what is missing."""
        row = self._connected().execute(sql.load("postmark_watched")).fetchone()
        assert row is not None  # noqa: S101 - the query's left side is one row
        return Watch(*row)


LOST = (psycopg.Error, Unreachable)
"""What the methods of `Postmarks` raise when the database is away."""
