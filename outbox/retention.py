"""Retention: old partitions of the log are archived, carried into the base, and dropped whole.

A partition goes when it is full, everything in it was committed some age ago, and nobody needs it any more: every lane
has passed it, no follower stands before it, nothing of it is parked, in doubt or part of a saga that has not ended.
`plan` says which, and who holds the first one that has to stay. `drop` takes the steps for one:

1. archive it (`outbox.archive`), durably, and note where in `outbox.archive`;
2. carry what is live in it into `outbox.base`, without a lock on the log;
3. drop it, and move the horizon, in one transaction that holds the log's lock for a moment.

Each step can be repeated and killed anywhere; two processes may take them at once. `forget` removes afterwards what is
known about intents that are gone. Called by `outbox retention` and by the clock's housekeeping (OUTBOX_RETENTION).

Errors: `NotReady` when the partition can't be dropped now, with the reason; those of `outbox.archive`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg.rows import class_row

from outbox import archive, sql
from outbox.archive import Archived, Written
from outbox.decision import client
from outbox.errors import NotReady
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.settings import NO_ARCHIVE, Settings
from outbox.span import seconds

PAGE = 5000
"""Intents that are read at a time for the archive."""

TRIES = 15
"""How often the log's lock is asked for. Each time, who writes waits 0.2 s at most (outbox.drop_partition)."""

PAUSE = 2.0
"""Seconds between the tries, about: nine tenths of the time nobody waits."""


class Hold(NamedTuple):
    """What a partition is kept for."""

    kind: Literal["lane", "follower", "parked", "receipt", "saga", "transaction"]
    #: The lane, the follower, the first intent, the first saga.
    name: str
    number: int
    since: datetime | None
    seconds: float | None

    def __str__(self) -> str:
        """One sentence, and what to do."""
        of = f"{self.number} " if self.number > 1 else ""
        first = f" (the first is {self.name})" if self.number > 1 else f" {self.name}"
        age = "" if self.seconds is None else f", since {seconds(self.seconds)}"
        match self.kind:
            case "lane":
                return f"lane {self.name} has not passed it: run its worker, and see outbox status"
            case "follower":
                return f"follower {self.name} needs it, last seen {seconds(self.seconds)} ago: see outbox status"
            case "parked":
                things = f"{of}intents are parked" if self.number > 1 else "intent is parked:"
                return f"{things}{first}{age}: see outbox why {self.name}"
            case "receipt":
                things = f"{of}attempts are not decided" if self.number > 1 else "the attempt is not decided of intent"
                return f"{things}{first}{age}: see outbox why {self.name}"
            case "saga":
                things = f"{of}sagas have not ended" if self.number > 1 else "the saga has not ended:"
                return f"{things}{first}{age}: see outbox saga show {self.name}"
            case _:
                return "a transaction is open that may have written to it: see outbox status, and end it"


class Partition(NamedTuple):
    """A full partition of the log."""

    name: str
    #: Its first id, and the first id after it.
    first: int
    until: int
    #: About how many it holds, by the server's statistics, and their size with indexes.
    intents: int
    bytes: int
    #: The tick that shows all of it; None: there is none yet.
    cut: int | None
    #: When that was, and how long ago.
    at: datetime | None
    seconds: float | None
    #: Where it is archived already.
    place: str | None
    archive: str | None


class Plan(NamedTuple):
    """What would be done."""

    #: Those that can be dropped, the oldest first.
    ready: list[Partition]
    #: The first one that has to stay; None: there is none that is full.
    kept: Partition | None
    #: What that one is kept for; empty: it is too young.
    holds: list[Hold]


def plan(conn: psycopg.Connection[Any], age: float) -> Plan:
    """Which partitions can be dropped, if what is `age` seconds old may go. Reads only."""
    ready: list[Partition] = []
    with conn.cursor(row_factory=class_row(Partition)) as cursor:
        found = cursor.execute(sql.load("retention_partitions")).fetchall()
    for each in found:
        if each.cut is None or each.seconds is None:
            return Plan(ready, each, [Hold("transaction", "", 1, None, None)])
        if each.seconds < age:
            return Plan(ready, each, [])
        rows = conn.execute(sql.load("retention_held"), {"until": each.until, "cut": each.cut})
        if holds := [Hold(*row) for row in rows]:
            return Plan(ready, each, holds)
        ready.append(each)
    return Plan(ready, None, [])


def drop(
    conn: psycopg.Connection[Any],
    partition: Partition,
    place: Path | str,
    *,
    age: float,
    endpoint: str | None = None,
    progress: Callable[[int], None] = lambda _count: None,
) -> Written:
    """Archive a partition at `place` (or `none`), carry what is live in it, and drop it: durable when it returns.

    `progress` is told how many intents were archived since. Raises `NotReady` when somebody needs it by now.
    """
    written = _archive(conn, partition, place, endpoint, progress)
    try:
        conn.execute("select outbox.carry(%s)", (partition.until,))
        hit("retention.carried")
        _drop(conn, partition, age)
    except psycopg.DatabaseError as error:
        if error.sqlstate != "OB060":
            raise
        raise NotReady(f"{partition.name} stays: {error.diag.message_primary}. {error.diag.message_hint}") from None
    hit("retention.dropped")
    return written


def _archive(
    conn: psycopg.Connection[Any],
    partition: Partition,
    place: Path | str,
    endpoint: str | None,
    progress: Callable[[int], None],
) -> Written:
    rows = _rows(conn, partition, progress)
    if place == NO_ARCHIVE:
        written = Written("", sum(1 for _ in rows), "", 0)
    else:
        place = place.absolute() if isinstance(place, Path) else place
        row = conn.execute("select log from outbox.identity").fetchone()
        assert row is not None  # noqa: S101 - the migration made the row
        written = archive.write(
            rows, place, log=row[0], first=partition.first, until=partition.until, endpoint=endpoint
        )
        hit("retention.archived")
    noted = {**written._asdict(), "first": partition.first, "until": partition.until, "place": str(place)}
    conn.execute(sql.load("retention_note"), {**noted, "client": client()})
    hit("retention.noted")
    return written


def _rows(conn: psycopg.Connection[Any], partition: Partition, progress: Callable[[int], None]) -> Iterator[Archived]:
    """Page by page, so that no transaction is open for as long as it takes. Nothing changes in there any more.

    Raises `NotReady` when it was dropped meanwhile: an archive without its rows must not lie beside the right one.
    """
    after = partition.first - 1
    while True:
        wanted = {"after": after, "until": partition.until, "limit": PAGE}
        page = conn.execute(sql.load("retention_rows"), wanted).fetchall()
        for row in page:
            yield Archived(Intent(*row[:8]), *row[8:])
        progress(len(page))
        if len(page) < PAGE:
            if conn.execute("select from outbox.partition where first = %s", (partition.first,)).fetchone() is None:
                raise NotReady(f"another process has just dropped {partition.name}: look again")
            return
        after = page[-1][0]


def _drop(conn: psycopg.Connection[Any], partition: Partition, age: float) -> None:
    for left in reversed(range(TRIES)):
        try:
            conn.execute("select outbox.drop_partition(%s, make_interval(secs => %s))", (partition.until, age))
        except psycopg.errors.LockNotAvailable:
            if not left:
                break
            time.sleep(random.uniform(0.5, 1.5) * PAUSE)  # noqa: S311 - against others in step, no secret
        else:
            return
    raise NotReady(
        f"{partition.name} is archived and stays for now: transactions that use the log are open all the time. "
        "See outbox status for the longest, and run outbox retention again"
    )


def place_of(settings: Settings) -> Path | str:
    """Where archives go. Raises `NotReady` when nothing says so: nothing is dropped without a word about that."""
    if settings.archive is None:
        raise NotReady(
            "OUTBOX_ARCHIVE is not set: say in which directory or s3://BUCKET/PREFIX the log is archived before it is "
            "dropped, or none"
        )
    return settings.archive


def keep(conn: psycopg.Connection[Any], settings: Settings) -> list[Partition]:
    """What the clock does now and then: drop what can be dropped, and forget what belongs to it. → what was dropped."""
    if settings.retention is None:
        return []
    place = place_of(settings)
    ready = plan(conn, settings.retention).ready
    for each in ready:
        drop(conn, each, place, age=settings.retention, endpoint=settings.s3_endpoint)
    forget(conn, settings.retention)
    return ready


def forget(conn: psycopg.Connection[Any], age: float) -> int:
    """Remove what is known about dropped intents, and sagas that ended `age` seconds ago. → how many rows.

    In transactions of some thousand rows; killed anywhere, the rest goes next time.
    """
    total = 0
    for statement, parameters in (
        ("select outbox.forget_dropped()", ()),
        ("select outbox.forget_sagas(make_interval(secs => %s))", (age,)),
    ):
        while True:
            row = conn.execute(statement, parameters).fetchone()
            hit("retention.forgotten")
            if row is None or not row[0]:
                break
            total += row[0]
    return total
