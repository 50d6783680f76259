"""`outbox resilver blob`: every live blob read and hashed, and those that are missing or damaged brought back.

    outbox resilver blob                    what the log itself still has: small blobs that travelled in their intents
    outbox resilver blob --from PLACE       … and the others from another store: a copy, or another site's
    outbox resilver blob --to PLACE         copies every live blob into another store, to move there

In place, nothing is done behind the lanes' backs. The bytes are staged in the store and hashed on the way, and a
repetition of the blob's put is appended to the log with them (`outbox.repetition`); a damaged blob is deleted before,
in the same way. The lane publishes them, and leaves out what something newer has overtaken.

Into another store, whose lanes are nobody's yet, blobs are published here, under epoch 0. It can be run again: it
copies what has come since, and moves what was deleted since into that store's trash. A store whose lanes have an owner
is refused.

Retention isn't held back: what is live is looked up anew for each part, and what comes behind is the lanes' business.

Progress is the last digest, written with what is appended: killed anywhere, it goes on there. What was staged by a
transaction that came to nothing, the sweeper removes.

Errors: `NotReady` for what is in the way, `Unavailable` when a store is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from outbox import live, repetition
from outbox.blob import BlobMissing, BlobStore
from outbox.database import Connection
from outbox.errors import BlobRefused, NotReady, Permanent, StoreRefused
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.operation import Operation
from outbox.participant import LaneView
from outbox.repetition import Again
from outbox.settings import Settings, is_bucket
from outbox.store import Store, open_store
from outbox.tick import Tick
from workers.blob import content_of, publisher
from workers.cli.course import Pace
from workers.resilver.draft import passed

log = logging.getLogger("outbox.resilver")

TARGET = "blob"

SHOWN = 100
"""Digests of lost blobs that the result names; `outbox scrub blob` lists all."""

LOOK = 20_000
"""Live blobs that are read from the database at a time: each time, the server sorts all of them."""

LOOK_BYTES = 16 << 20
"""… and bytes of their intents, which may hold the blobs themselves."""

SAVE_BYTES = 64 << 20
"""Bytes read between writes of how far it is, which also keep the operation's lease."""

_DELETE = "{}"


class Plan(NamedTuple):
    """What there is to do."""

    blobs: int
    bytes: int


def plan(conn: Connection) -> Plan:
    """Count the live blobs, and their bytes. Reads the log once."""
    blobs, size = 0, 0
    for intent in live.puts(conn, TARGET, passed(conn, TARGET)):
        blobs, size = blobs + 1, size + _size(intent)
    return Plan(blobs, size)


def place(settings: Settings, text: str) -> Store:
    """The store of a directory or of `s3://BUCKET/PREFIX`. Raises `NotReady`."""
    if text.startswith("s3:") and not text.startswith("s3://"):
        raise NotReady(f"{text} is not a store: write s3://BUCKET/PREFIX or the path of a directory")
    return open_store(replace(settings, blobs=text if is_bucket(text) else Path(text)))


def source(settings: Settings, text: str) -> Store:
    """The same, of a store that there is. Raises `NotReady`."""
    store = place(settings, text)
    if isinstance(store, BlobStore) and not (store.directory / "objects").is_dir():
        raise NotReady(f"there is no store of blobs in {text}: name the directory that has the folder objects in it")
    return store


def run(
    conn: Connection, settings: Settings, course: Operation, tell: Callable[[str, int], None], pace: Pace
) -> dict[str, Any]:
    """Do it, or go on with it. `tell` hears of bytes read. → what came of it."""
    target = course.request.get("to")
    store = open_store(settings)
    sources = [source(settings, other)] if (other := course.request.get("from")) else []
    if target:
        work: _Repair | _Copy = _Copy(conn, course, place(settings, target), [store, *sources])
    else:
        work = _Repair(conn, course, store, sources)
    try:
        at = passed(conn, TARGET)
        for intent in _live(conn, at, course.progress.get("after", "")):
            size = _size(intent)
            work.take(intent, size)
            tell("reading", size)
            pace.keep(size)
        work.save(work.last)
        work.tidy()
    finally:
        work.close()
    return work.result()


def _live(conn: Connection, at: Tick, after: str) -> Iterator[Intent]:
    """Live blobs, many at a time: a transaction of hours would hold back the database's housekeeping."""
    while True:
        found: list[Intent] = []
        size = 0
        puts = live.puts(conn, TARGET, at, after=after)
        for intent in puts:
            found.append(intent)
            size += len(intent.body)
            if len(found) == LOOK or size > LOOK_BYTES:
                break
        # Its transaction ends with it.
        del puts
        if not found:
            return
        yield from found
        after, at = found[-1].key, passed(conn, TARGET)


class _Work:
    """What both ways have in common: how far it is, and what was found."""

    def __init__(self, conn: Connection, course: Operation) -> None:
        self.conn, self.course = conn, course
        progress = course.progress
        self.last: str = progress.get("after", "")
        self.counts: dict[str, int] = progress.get("counts", {})
        self.lost: list[str] = progress.get("lost", [])
        self._unsaved = 0

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def lose(self, digest: str) -> None:
        """Nobody has it."""
        self.count("lost")
        if len(self.lost) < SHOWN:
            self.lost.append(digest)

    def passed(self, digest: str, size: int) -> None:
        """It is done, or nothing can be done."""
        self._unsaved += size
        self.last = digest
        if self._unsaved > SAVE_BYTES:
            self.save(digest)

    def save(self, digest: str) -> None:
        """Write down how far it is; in the caller's transaction, if there is one."""
        self._unsaved, self.last = 0, digest
        self.course.save(self.conn, {"after": digest, "counts": self.counts, "lost": self.lost})

    def tidy(self) -> None:
        """All were taken: what is there and should not be goes."""

    def result(self) -> dict[str, Any]:
        return {**self.counts, "digests": self.lost}

    def close(self) -> None:
        """Let go of what is open."""


class _Repair(_Work):
    """In place, by repetitions."""

    def __init__(self, conn: Connection, course: Operation, store: Store, sources: list[Store]) -> None:
        super().__init__(conn, course)
        self._store, self._sources = store, sources

    def take(self, intent: Intent, size: int) -> None:
        digest = intent.key
        state = _state(self._store, digest, size)
        self.count(state)
        if state == "whole":
            self.passed(digest, size)
            return
        # Before anything is looked at again: what isn't seen now is above it.
        since = repetition.since(self.conn)
        with self.conn.transaction():
            again = self._bytes(intent, size, since)
            if again is None:
                self.lose(digest)
            elif state == "damaged":
                # The put would find something of its size there, and leave it.
                repetition.append(self.conn, self.course, TARGET, [Again(0, since, digest, "delete", _DELETE), again])
            else:
                repetition.append(self.conn, self.course, TARGET, [again])
            self.save(digest)
        hit("resilver.repeated")

    def _bytes(self, intent: Intent, size: int, since: int) -> Again | None:
        """The put with bytes that are there; None if nobody has them."""
        if "bytes" in intent.payload:
            return Again(intent.id, since)
        row = self.conn.execute("select pg_current_xact_id()::text::bigint, log from outbox.identity").fetchone()
        assert row is not None  # noqa: S101 - the migration made the row
        for other in self._sources:
            with _passing_over(), other.open(intent.key) as file:
                staged = self._store.stage(file, xid=row[0], log=row[1], size=size)
                if staged.digest == intent.key:
                    self.count("staged")
                    return Again(intent.id, since, intent.key, "put", json.dumps(intent.payload | staged._asdict()))
                # The copy is damaged too.
                self._store.remove_stage(staged.stage)
        return None


class _Copy(_Work):
    """Into another store, from the first that has it whole."""

    def __init__(self, conn: Connection, course: Operation, store: Store, sources: list[Store]) -> None:
        super().__init__(conn, course)
        self._store, self._sources = store, sources
        row = conn.execute("select log from outbox.identity").fetchone()
        assert row is not None  # noqa: S101 - the migration made the row
        self._log = str(row[0])
        self._publisher = publisher(store, LaneView(TARGET, 0, 0, unclean=False))

    def take(self, intent: Intent, size: int) -> None:
        digest = intent.key
        if _state(self._store, digest, size) == "whole":
            self.count("there")
        elif self._copy(intent, size):
            self.count("copied")
        else:
            self.lose(digest)
        self.passed(digest, size)

    def tidy(self) -> None:
        """Delete what the log has deleted since a run before. What the log has never heard of is somebody else's."""
        for word in repetition.words(self.conn, TARGET, {}):
            with suppress(Permanent):
                if word.action == "delete" and self._store.exists(word.key):
                    with self._publisher.batch() as publication:
                        publication.delete(word.key, epoch=0, id=word.id)
                    self.count("deleted")

    def _copy(self, intent: Intent, size: int) -> bool:
        content = content_of(intent)
        if "bytes" in intent.payload:
            with self._publisher.batch() as publication:
                publication.delete(intent.key, epoch=0, id=intent.id)
                publication.put(content)
            return True
        row = self.conn.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None  # noqa: S101 - a select without FROM has one row
        for other in self._sources:
            with _passing_over(), other.open(intent.key) as file:
                staged = self._store.stage(file, xid=row[0], log=self._log, size=size)
                if staged.digest == intent.key:
                    with self._publisher.batch() as publication:
                        # A damaged one of the same size would be left there.
                        publication.delete(intent.key, epoch=0, id=intent.id)
                        publication.put(staged)
                    hit("resilver.copied")
                    self._publisher.settle([staged.stage])
                    return True
                self._store.remove_stage(staged.stage)
        return False

    def close(self) -> None:
        self._publisher.close()


@contextmanager
def _passing_over() -> Iterator[None]:
    """Inside, a source that doesn't have the bytes, or can't give them, is no matter: there may be others."""
    try:
        yield
    except StoreRefused:
        # It is not the source that fails.
        raise
    except (BlobMissing, BlobRefused):
        pass


def _state(store: Store, digest: str, size: int) -> str:
    found = store.size(digest)
    if found is None:
        return "missing"
    try:
        return "whole" if found == size and store.verify(digest) else "damaged"
    except BlobMissing:
        return "missing"
    except OSError as error:
        log.warning("%s can't be read (%s)", digest, error.strerror)
        return "damaged"


def _size(intent: Intent) -> int:
    try:
        return content_of(intent).size
    except Permanent:
        # It can't be applied, so it isn't live: its lane is about to park it.
        return 0
