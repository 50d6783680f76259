"""A draft: one shard of the index's next generation, while it is built beside the one that serves.

    build      what is live at a tick that all lanes have passed, in order of keys, in large commits
    catch_up   what the lanes have applied since, by the log; again and again, until little is left
    check      compare every document with what is live

A draft follows the lanes, and never overtakes them: only what they have all passed is decided, applied or set aside
(parked, skipped, recalled). What is set aside is left out, and remembered: when it is applied later, the draft catches
it up, although its place in the log is behind.

What it needs for that lies in the shard itself, in the transactions of the documents: the position, the last key while
it is built, and what was left out. So a draft that was killed goes on from there; one that can't (its tick is not in
the log any more, or this version makes other terms) begins anew.

Only reads the database. Errors: `Unavailable` from the shard, `NotReady` when a document can't be indexed by this
version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg

from outbox import live, log, sql, tick
from outbox.document import key_term
from outbox.errors import NotReady, NotThisLog, Permanent
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.log import Slots
from outbox.position import Position
from outbox.repetition import Repeats, overtaken
from outbox.tick import Tick
from workers.index import Put, format_of_documents, ready, write
from workers.shard import FORMAT, POSITION, Shard

TARGET = "index"

BATCH = 2000
"""Documents of a commit. More take memory and no less time."""

BATCH_BYTES = 4_000_000

PAGE = 1000
"""Intents looked at in one go."""

SHOWN = 10
"""Wrong documents that are told of; one is enough to stop."""

BASIS = "outbox.draft.basis"
"""Name of the metadata that holds the position of the tick that a draft is built at."""

AFTER = "outbox.draft.after"
"""Name of the metadata that holds the last key that was built."""

ASIDE = "outbox.draft.aside"
"""Name of the metadata that holds the ids of what was left out because it was set aside."""


def slots_of(lane: int, lanes: int) -> Slots:
    """A lane's share of the keys; the same as in outbox.swap."""
    return Slots(lane * 16384 // lanes, (lane + 1) * 16384 // lanes - 1)


def passed(conn: psycopg.Connection[Any], target: str = TARGET) -> Tick:
    """The newest tick that all lanes of a participant have passed."""
    row = conn.execute(sql.load("lane_passed"), {"target": target}).fetchone()
    if row is None:
        raise NotReady(f"{target} has no lanes, or the log no tick: run `outbox status`")
    return Tick(*row)


class Draft:
    """One shard of a generation that nobody reads yet. One thread at a time."""

    def __init__(self, place: Path, lane: int, lanes: int) -> None:
        """`place` is the generation's folder."""
        self.slots = slots_of(lane, lanes)
        self.path = place / f"{lane:02d}"
        self._shard = self._new()
        self._db = self._shard.database()
        if self._said(FORMAT) != format_of_documents():
            self.begin_anew()
        self._aside = set(json.loads(self._said(ASIDE) or "[]"))

    def _new(self) -> Shard:
        # Of epoch 0: whoever owns the lane once it serves has a higher one.
        return Shard(self.path, 0, self.slots, format_of_documents())

    def _said(self, name: str) -> str:
        return str(self._db.get_metadata(name).decode())

    def begin_anew(self) -> None:
        """Throw away what was built."""
        self._shard.drop()
        shutil.rmtree(self.path)
        self._shard = self._new()
        self._db = self._shard.database()
        self._aside = set()

    @property
    def position(self) -> Position | None:
        """How far it is; None until it is built."""
        text = self._said(POSITION)
        return Position.parse(text) if text else None

    @property
    def tick(self) -> int:
        """The tick that it goes on from."""
        return Position.parse(self._said(POSITION) or self._said(BASIS)).tick

    @property
    def documents(self) -> int:
        """How many it has."""
        return int(self._db.get_doccount())

    @property
    def aside(self) -> list[int]:
        """What was left out because it was set aside, and has not been caught up since."""
        return sorted(self._aside)

    def close(self) -> None:
        """Let go of the files."""
        self._shard.drop()

    # ------------------------------------------------------------------------------------------- build

    def build(self, conn: psycopg.Connection[Any], tell: Callable[[int], None]) -> None:
        """Write what is live, or the rest of it. `tell` hears of each commit how many documents it had."""
        if self.position is not None:
            with suppress(NotThisLog):
                tick.match(conn, self.position)
                return
            # Nobody has held the log for it.
            self.begin_anew()
        basis, at = self._basis(conn)
        with _snapshot(conn):
            parameters = {
                "target": TARGET,
                "slot_low": self.slots.low,
                "slot_high": self.slots.high,
                "high": at.high,
            }
            self._aside.update(row[0] for row in conn.execute(sql.load("parked_before"), parameters))
            # Before any document: of what is parked now, nothing may be forgotten.
            with self._shard.transaction() as db:
                self._remember(db)
            found = live.puts(conn, TARGET, at, slots=self.slots, after=self._said(AFTER))
            for batch in _cut(found):
                with self._shard.transaction() as db:
                    write(self._shard, db, {intent.key: _readable(intent) for intent in batch})
                    db.set_metadata(AFTER, batch[-1].key)
                hit("resilver.built")
                tell(len(batch))
        with self._shard.transaction() as db:
            db.set_metadata(POSITION, str(basis))
        hit("resilver.based")

    def _basis(self, conn: psycopg.Connection[Any]) -> tuple[Position, Tick]:
        """The tick that it is built at: a new one, or the one that it was begun with."""
        if text := self._said(BASIS):
            basis = Position.parse(text)
            try:
                if tick.match(conn, basis) == basis:
                    return basis, tick.get(conn, basis.tick)
            except NotThisLog:
                pass
            self.begin_anew()
        at = passed(conn)
        row = conn.execute("select log from outbox.identity").fetchone()
        assert row is not None  # noqa: S101 - the migration made the row
        basis = Position(row[0], at.id, at.nonce)
        with self._shard.transaction() as db:
            db.set_metadata(BASIS, str(basis))
        return basis, at

    def _remember(self, db: Any) -> None:
        db.set_metadata(ASIDE, json.dumps(self.aside, separators=(",", ":")))

    # ---------------------------------------------------------------------------------------- catch up

    def catch_up(self, conn: psycopg.Connection[Any]) -> int:
        """Go on to where all lanes are. → how many intents that took."""
        with _snapshot(conn):
            return self._catch_up(conn, passed(conn))

    def _catch_up(self, conn: psycopg.Connection[Any], end: Tick) -> int:
        """In one snapshot, so that what is set aside and where the lanes are is of one moment."""
        position = self.position
        assert position is not None  # noqa: S101 - it is built first
        # A tick that was thinned: some intents come again, and end as they were.
        start = tick.get(conn, tick.match(conn, position).tick)
        again = sorted(self._aside - _set_aside(conn, self._aside))
        count = 0
        for intents in self._pages(conn, start, end):
            left_out = _set_aside(conn, [intent.id for intent in intents])
            self._aside |= left_out
            out = left_out | self._overtaken(conn, intents, start, end)
            with self._shard.transaction() as db:
                write(self._shard, db, {i.key: _readable(i) for i in intents if i.id not in out})
                self._remember(db)
            hit("resilver.caught")
            count += len(intents)
        # Their place in the log is behind: of their keys, something later may be the last word.
        for part in _parts(again):
            keys = dict.fromkeys((intent.key for intent in log.fetch(conn, part)), None)
            words = live.puts(conn, TARGET, end, slots=self.slots, keys=list(keys))
            with self._shard.transaction() as db:
                write(self._shard, db, {**keys, **{intent.key: _readable(intent) for intent in words}})
            count += len(part)
        if again or end.id > position.tick:
            self._aside.difference_update(again)
            with self._shard.transaction() as db:
                if end.id > position.tick:
                    db.set_metadata(POSITION, str(Position(position.log, end.id, end.nonce)))
                self._remember(db)
        return count

    def _pages(self, conn: psycopg.Connection[Any], start: Tick, end: Tick) -> Iterator[list[Intent]]:
        while end.id > start.id:
            upto, after = tick.reach(conn, start, end), 0
            while not tick.same_place(start, upto) and (
                page := log.page(conn, start, upto, target=TARGET, slots=self.slots, after=after, limit=PAGE)
            ):
                after = page[-1].id
                yield [intent for intent in page if intent.action in ("put", "delete")]
            start = upto

    def _overtaken(self, conn: psycopg.Connection[Any], page: Sequence[Intent], start: Tick, end: Tick) -> set[int]:
        found = [(intent, says) for intent in page if (says := Repeats.read(intent)) is not None]
        return overtaken(conn, TARGET, self.slots, found, start=start, end=end) if found else set()

    # ------------------------------------------------------------------------------------------- check

    def check(self, conn: psycopg.Connection[Any], tell: Callable[[int], None]) -> list[str]:
        """Catch up, and compare every document with what is live. → what is wrong, in words; nothing: all is well."""
        wrong: list[str] = []
        with _snapshot(conn):
            end = passed(conn)
            self._catch_up(conn, end)
            count = 0
            for intent in live.puts(conn, TARGET, end, slots=self.slots):
                count += 1
                if len(wrong) < SHOWN and self._digest(intent.key) != sha256(intent.body.encode()).hexdigest():
                    wrong.append(f"the document of intent {intent.id} is missing or another one")
                if not count % PAGE:
                    tell(PAGE)
            tell(count % PAGE)
        if self.documents != count and not wrong:
            wrong.append(f"{self.documents - count} documents are of no live key")
        return wrong

    def _digest(self, key: str) -> str | None:
        for posting in self._db.postlist(key_term(key)):
            return str(json.loads(self._db.get_document(posting.docid).get_data())["digest"])
        return None


@contextmanager
def _snapshot(conn: psycopg.Connection[Any]) -> Iterator[None]:
    """Inside, the database stands still for this connection."""
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        yield


def _set_aside(conn: psycopg.Connection[Any], ids: Iterable[int]) -> set[int]:
    """Those of `ids` that are parked, skipped or recalled."""
    return {row[0] for part in _parts(sorted(ids)) for row in conn.execute(sql.load("log_aside"), {"ids": part})}


def _parts(ids: Sequence[int]) -> Iterator[list[int]]:
    for first in range(0, len(ids), PAGE):
        yield list(ids[first : first + PAGE])


def _cut(found: Iterable[Intent]) -> Iterator[list[Intent]]:
    """Batches of a commit's size."""
    batch: list[Intent] = []
    size = 0
    for intent in found:
        if batch and (len(batch) == BATCH or size + len(intent.body) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(intent)
        size += len(intent.body)
    if batch:
        yield batch


def _readable(intent: Intent) -> Put | None:
    try:
        return ready(intent)
    except Permanent as error:
        raise NotReady(
            f"this version can't index intent {intent.id} any more ({error}): put its key anew or delete it, and resume"
        ) from error
