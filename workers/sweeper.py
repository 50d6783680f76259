"""The sweeper: removes staged files that nothing needs any more, and purges the trash.

The clock's process calls `sweep` now and then. A staged file's name tells its transaction, and Postgres
tells what became of that: no age is guessed, so a file goes at once when its transaction was rolled back,
and stays as long as it takes when its intent waits. An upload to S3
that broke off is a staged file like any other. What is removed is not needed by anyone, so nothing
needs to be durable: a crash leaves work for the next sweep.

Raises OSError or `Unavailable` when the store fails, `psycopg.OperationalError` when the database is lost.
`conn` should be in autocommit mode, or its transaction stays open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import psycopg

from outbox import sql
from outbox.blob import Stage
from outbox.failpoint import hit
from outbox.store import Store

BATCH = 1000
"""Staged files asked about in one statement."""

REMOVED = ("aborted", "unused", "done")
"""Fates of `stage_fate.sql` after which a staged file isn't needed."""


class Swept(NamedTuple):
    """What a sweep found."""

    #: Removed: the transaction was rolled back.
    aborted: int = 0
    #: Removed: the transaction committed, and the savepoint that staged it was rolled back.
    unused: int = 0
    #: Removed: published; the worker died before it could.
    done: int = 0
    #: Kept: the transaction is running, or prepared.
    running: int = 0
    #: Kept: committed, and not published yet.
    pending: int = 0
    #: Kept: of another database, or of a history that this one doesn't have.
    foreign: int = 0
    #: Purged from the trash.
    trash: int = 0


def sweep(conn: psycopg.Connection[Any], store: Store, *, log: str, trash_age: float) -> Swept:
    """Remove what isn't needed of the staged files of `log`, and trash older than `trash_age` seconds.

    `log` is the database's identity (`outbox.identity`). Needs a worker's rights.
    """
    counts: Counter[str] = Counter()
    # Listed first, asked afterwards: what comes later is the next sweep's.
    stages = list(store.stages())
    ours = [stage for stage in stages if stage.log == log]
    counts["foreign"] += len(stages) - len(ours)
    for name, fate in _fates(conn, ours):
        if fate not in REMOVED or store.remove_stage(name):
            counts[fate] += 1
            if fate in REMOVED:
                hit("sweep.removed")
    counts["trash"] = store.purge_trash(trash_age)
    return Swept(**counts)


def _fates(conn: psycopg.Connection[Any], stages: Iterable[Stage]) -> Iterable[tuple[str, str]]:
    """Each staged file with its fate."""
    # Files of one transaction in one statement, as far as possible: its intents are read once for all of them.
    rest = iter(sorted(stages, key=lambda stage: stage.xid))
    while batch := list(islice(rest, BATCH)):
        yield from conn.execute(
            sql.load("stage_fate"),
            {"name": [stage.name for stage in batch], "xid": [str(stage.xid) for stage in batch]},
        ).fetchall()
