"""`outbox resilver index`: the index built anew beside the one that serves, and put in its place.

    plan → build → catch up → check → catch up → swap → drain → ready → remove the old one

The old index serves and is written until the swap, and searches until the new one is ready (`workers.resilver.swap`).
Each shard is built by a thread of its own, with a connection of its own (`workers.resilver.draft`).

Killed before the swap, it goes on where the drafts are; killed after it, it removes the old generation. Which of the
two is seen by the generation in the database.

Errors: `NotReady` for what is in the way, `Unavailable` when the disk is, `Fenced` when somebody else has resumed it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from outbox import follower, generation, live, operation, sql
from outbox.database import Connection, connect
from outbox.errors import NotReady
from outbox.failpoint import hit
from outbox.operation import Operation
from outbox.settings import Settings
from workers.cli.course import Pace
from workers.resilver import swap
from workers.resilver.draft import TARGET, Draft, passed

LITTLE = 500
"""Intents: with fewer to catch up, the swap begins. They are what the new lanes drain while the old ones stand."""

ROUNDS = 20
"""Rounds of catching up. If the lanes are faster than that, the rest is drained after the swap."""

SAVE_EVERY = 5.0
"""Seconds between writes of how far it is, which also keep the operation's lease."""

RATE = 500.0
"""Documents a second of one thread, until a first resilver has told better."""

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What a resilver of the index would do."""

    directory: str
    documents: int
    shards: int
    shards_now: int
    generation: int
    generation_now: int
    #: Bytes of the index as it is, and how many are free beside it.
    bytes_now: int
    bytes_free: int
    #: About how long it takes.
    seconds: float

    @property
    def asked(self) -> dict[str, Any]:
        """The operation's request: the same command asks for the same."""
        return {"target": TARGET, "directory": self.directory, "shards": self.shards}

    def obstacle(self) -> str | None:
        """What is in the way, if anything."""
        if self.bytes_free < self.bytes_now * 1.1:
            return (
                f"there is not enough room: both indexes need {size(self.bytes_now)} each, and {size(self.bytes_free)} "
                "are free: make room on that disk, or move the index to a larger one"
            )
        return None


def plan(conn: psycopg.Connection[Any], directory: Path, shards: int | None) -> Plan:
    """Look what there is to do. Reads the log once, to count."""
    lanes, now = _now(conn)
    shards = shards or lanes
    documents = live.count(conn, TARGET, passed(conn))
    there = next(part for part in (directory, *directory.parents) if part.is_dir())
    return Plan(
        directory=str(directory),
        documents=documents,
        shards=shards,
        shards_now=lanes,
        # Beyond whatever lies there: a database that was restored to an earlier time has forgotten some.
        generation=max([now, *generation.folders(directory)]) + 1,
        generation_now=now,
        bytes_now=sum(map(_bytes, _shards(directory, now))),
        bytes_free=shutil.disk_usage(there).free,
        seconds=documents / (_rate(conn) * min(shards, _threads())),
    )


def begin(conn: psycopg.Connection[Any], planned: Plan) -> Operation:
    """Begin it. Raises `NotReady` while another one of this index has not ended."""
    for row in operation.find(conn, kind="resilver", state="running"):
        if row["request"].get("target") == TARGET:
            raise NotReady(
                f"resilver {row['id']} of the index ({row['request'].get('shards')} shards) has not ended: go on with "
                f"outbox resilver index --resume {row['id']}, or give it up with outbox operations abandon {row['id']}"
            )
    progress = {"was": planned.generation_now, "generation": planned.generation, "documents": planned.documents}
    return operation.begin(conn, "resilver", planned.asked, progress)


def run(
    conn: Connection, settings: Settings, course: Operation, tell: Callable[[str, int], None], pace: Pace
) -> dict[str, Any]:
    """Do it, or go on with it. `tell` hears of each piece of work: what, and how many documents. → what came of it.

    `conn` is an operator's, `settings` the workers'.
    """
    directory = Path(course.request["directory"])
    was, number = course.progress["was"], course.progress["generation"]
    started = time.monotonic()
    result: dict[str, Any] = {"generation": number, "shards": course.request["shards"]}
    _, now = _now(conn)
    # All of it may be lost.
    os.makedirs(directory, exist_ok=True)
    if now == was:
        course.hold(conn, passed(conn).id, "outbox resilver index: builds a generation from this tick on")
        swap.remove(directory, [was, number, generation.current(directory)])
        result |= _Making(conn, settings, course, tell, pace).make(directory)
    elif now != number:
        raise NotReady(
            f"the index is at generation {now}, which is another resilver's: give this one up with "
            f"outbox operations abandon {course.id}"
        )
    swap.serve(directory, number)
    swap.remove(directory, [number])
    return result | {"seconds": round(time.monotonic() - started, 3)}


class _Making:
    """Building a generation, up to the swap."""

    def __init__(
        self,
        conn: Connection,
        settings: Settings,
        course: Operation,
        tell: Callable[[str, int], None],
        pace: Pace,
    ) -> None:
        self._conn = conn
        self._settings = settings
        self._course = course
        self._tell = tell
        self._pace = pace
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def make(self, directory: Path) -> dict[str, Any]:
        """Build it, swap, and drain it."""
        was, number = self._course.progress["was"], self._course.progress["generation"]
        shards = self._course.request["shards"]
        place = generation.folder(directory, number)
        os.makedirs(place, exist_ok=True)
        started = time.monotonic()
        with ExitStack() as stack:
            drafts = []
            for shard in range(shards):
                drafts.append(Draft(place, shard, shards))
                stack.callback(drafts[-1].close)
            self._each(drafts, "building", lambda draft, conn, tell: draft.build(conn, tell))
            built = time.monotonic() - started
            caught = self._catch_up(drafts)
            wrong = [why for found in self._each(drafts, "checking", Draft.check) for why in found]
            if wrong:
                raise NotReady(
                    f"the new index is not what the log says ({wrong[0]}), and the old one stays: look at the disk, "
                    f"give it up with outbox operations abandon {self._course.id}, and begin anew"
                )
            hit("resilver.checked")
            caught += self._catch_up(drafts)
            documents = sum(draft.documents for draft in drafts)
            self._course.save(self._conn, self._course.progress)
            lanes = swap.swap(
                self._conn, directory, drafts, was=was, number=number, ttl=self._settings.ttl
            )  # fmt: skip
        swap.drain(self._conn, self._settings, directory, lanes, was)
        return {
            "documents": documents,
            "caught_up": caught,
            "documents_per_second": round(documents / max(built, 1e-3)),
        }

    def _catch_up(self, drafts: list[Draft]) -> int:
        total = 0
        for _ in range(ROUNDS):
            count = sum(self._each(drafts, "catching up", lambda draft, conn, _: draft.catch_up(conn)))
            total += count
            follower.move(self._conn, self._course.follower, min(draft.tick for draft in drafts))
            if count <= LITTLE:
                break
        return total

    def _each(self, drafts: list[Draft], what: str, work: Callable[[Draft, Connection, Tell], Any]) -> list[Any]:
        """Do the same to all drafts, side by side; keep the operation's lease meanwhile."""

        def tell(count: int) -> None:
            with self._lock:
                self._tell(what, count)
                for _ in range(count):
                    # One at a time: who is told to stop doesn't sleep through it.
                    if self._stop.is_set():
                        raise NotReady("it is stopped")
                    self._pace.keep(1)

        def one(draft: Draft) -> Any:
            with self._connection() as conn:
                return work(draft, conn, tell)

        with ThreadPoolExecutor(min(len(drafts), _threads()), "resilver") as pool:
            futures: list[Future[Any]] = [pool.submit(one, draft) for draft in drafts]
            try:
                left = set(futures)
                while left:
                    done, left = wait(left, timeout=SAVE_EVERY)
                    for future in done:
                        future.result()
                    self._course.save(self._conn, {**self._course.progress, "doing": what})
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise
            return [future.result() for future in futures]

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with connect(self._settings.database, name="resilver") as conn:
            yield conn


def _now(conn: psycopg.Connection[Any]) -> tuple[int, int]:
    row = conn.execute(sql.load("generation_now"), {"target": TARGET}).fetchone()
    if row is None:
        raise NotReady("no participant 'index' is registered: run outbox register index")
    return row[0], row[1]


def _rate(conn: psycopg.Connection[Any]) -> float:
    """Documents a second of one thread, as the last resilver has measured."""
    for row in reversed(operation.find(conn, kind="resilver", state="done", limit=20)):
        result = row["result"] or {}
        if row["request"].get("target") == TARGET and result.get("documents", 0) >= LITTLE:
            return float(max(1, result["documents_per_second"] / min(result["shards"], _threads())))
    return RATE


def _threads() -> int:
    """Shards that are built at a time: Xapian lets go of the interpreter, so there is something to gain."""
    return max(1, len(os.sched_getaffinity(0)))


def _shards(directory: Path, number: int) -> list[Path]:
    place = generation.folder(directory, number)
    return [shard.parent for shard in place.glob("[0-9][0-9]*/iamglass")] if place.is_dir() else []


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
