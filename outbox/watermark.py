"""The watermark: what this machine has seen of the log, kept where the database's backups don't reach.

A database whose files were rolled back as a whole (a snapshot of its file system or of its machine) doesn't know it.
Nor does one whose directory was copied, with the original still at work. So each owner of a lane writes down how far
it is in the state directory, about once a second, and looks at all that was written there when it claims a lane:

    DIR/watermark/LOG.TARGET-LANE     one position, and the number (inode) of the directory that it was written in

Nothing here needs to be on disk: a watermark that is lost or old notices less, and never stops what is well. Without
a state directory there is none.

Called by `workers.tenure`, and by `outbox adopt`. Errors: `WentBack` when the log doesn't have what was seen;
`NotThisLog` when the directory is a copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

from outbox import tick
from outbox.era import REMEDY, Era, identity
from outbox.errors import NotThisLog, WentBack
from outbox.position import Position

logger = logging.getLogger("outbox.watermark")

EVERY = 1.0
"""Seconds between notes: what is forgotten in less time than that goes unnoticed."""

FOLDER = "watermark"

_COPY = (
    "this state directory is a copy, and the workers of the original may be at work for the same participants: "
    "if they are, stop them or these"
)


class Watermark:
    """The notes of one owner, and those of all others of this machine."""

    def __init__(self, state: Path | None, name: str = "") -> None:
        self._folder = None if state is None else state / FOLDER
        self._name = name.replace("/", "-")
        self._noted: Position | None = None
        self._noted_at = 0.0

    def check(self, conn: psycopg.Connection[Any], era: Era) -> None:
        """Raise `WentBack` if the log lacks what was seen here, `NotThisLog` if the directory is a copy."""
        if self._folder is None or not self._folder.is_dir():
            return
        inode = self._folder.stat().st_ino
        row = conn.execute("select tick from outbox.horizon").fetchone()
        # Of an earlier era, or of what was lost between two, an operator has decided; and what retention has dropped
        # can't be looked for.
        since = max(era.opened, row[0] if row else 0)
        for position, written_in in self._read(identity(conn)):
            if position.tick < since:
                continue
            tick.match(conn, position)
            if written_in != inode:
                raise NotThisLog(f"{_COPY}. {REMEDY}")

    def trouble(self, conn: psycopg.Connection[Any], era: Era) -> str | None:
        """What `check` would raise, as a sentence."""
        try:
            self.check(conn, era)
        except WentBack as error:
            return error.says
        except NotThisLog:
            return _COPY
        return None

    def _read(self, log: str) -> Iterator[tuple[Position, int]]:
        assert self._folder is not None  # noqa: S101 - the caller looked
        for file in sorted(self._folder.glob(f"{log}.*")):
            with suppress(OSError, ValueError):
                position, inode = file.read_text(encoding="ascii").split()
                yield Position.parse(position), int(inode)

    def note(self, position: Position, *, at_once: bool = False) -> None:
        """Write down how far the lane is, if it is time to. Never fails: a full disk is no reason to stop."""
        if self._folder is None or position == self._noted:
            return
        now = time.monotonic()
        if self._noted is not None and not at_once and now - self._noted_at < EVERY:
            return
        file = self._folder / f"{position.log}.{self._name}"
        new = file.with_name(f".{file.name}.new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            new.write_text(f"{position} {self._folder.stat().st_ino}\n", encoding="ascii")
            new.replace(file)
        except OSError as error:
            if self._noted is None:
                logger.warning("no watermark can be written (%s): see OUTBOX_STATE", error.strerror or error)
        self._noted, self._noted_at = position, now
