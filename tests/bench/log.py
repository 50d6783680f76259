"""`log-1e5`, `log-1e6`, `log-held`: from the log to a participant that does nothing.

The first two hold the whole reader (pages between ticks, order, lane and position) against one client that
selects the same columns of the same rows in pages by id, and does nothing with them. `log-held` holds the reader
against itself, while another connection has written to the log and doesn't commit, and a third one sits on a
REPEATABLE READ snapshot: that is what brings queues to their knees which update or delete rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg

from tests.bench.figure import Bar, Figure
from tests.bench.noop import TARGET, Noop
from tests.bench.pair import compare
from tests.bench.rig import Rig, drain, rig
from tests.bench.site import Site

CHUNK = 50_000
"""Rows that are written in one transaction."""

_ROWS = """
insert into outbox.log (target, action, key, payload)
select %(target)s, 'put', 'note/' || n, jsonb_build_object('title', 'Note ' || n, 'text', repeat(md5(n::text), 5))
  from generate_series(1, %(count)s) as n
 order by n
"""

_PLAIN = """
select id, target, action, key, payload::text, due, saga, headers::text
  from outbox.log where id > %s order by id limit %s
"""


def small(site: Site, *, quick: bool) -> Iterator[Figure]:
    """10⁵ rows."""
    yield from _against_select(site, "log-1e5", 100_000, pairs=3 if quick else 15)


def large(site: Site, *, quick: bool) -> Iterator[Figure]:
    """10⁶ rows."""
    yield from _against_select(site, "log-1e6", 1_000_000, pairs=1 if quick else 5)


def _against_select(site: Site, name: str, count: int, *, pairs: int) -> Iterator[Figure]:
    with rig(site, TARGET) as made:
        _load(made, count)
        # Now, and not by autovacuum in the middle of a run.
        made.admin.execute("vacuum (analyze) outbox.log")
        made.tick()

        def reader() -> float:
            noop = Noop(from_start=True)
            with made.reader(noop) as reader:
                reader.open()
                took = drain(reader)
            _check(noop, count)
            return count / took

        def plain() -> float:
            with psycopg.connect(made.url, autocommit=True) as conn:
                start = time.perf_counter()
                found, last = 0, 0
                while page := conn.execute(_PLAIN, (last, Noop.batch_limit)).fetchall():
                    found, last = found + len(page), page[-1][0]
                took = time.perf_counter() - start
            if found != count:
                raise RuntimeError(f"{found:,} rows selected of {count:,}")
            return count / took

        pair = compare(reader, plain, pairs=pairs)
    yield Figure(f"{name}.ratio", pair.ratio, "ratio of rows/s", Bar(">=", 0.5))
    yield Figure(f"{name}.reader", pair.ours, "rows/s")
    yield Figure(f"{name}.select", pair.theirs, "rows/s")


def held(site: Site, *, quick: bool) -> Iterator[Figure]:
    """With a transaction held open, against without."""
    count = 100_000
    with rig(site, TARGET) as made, ExitStack() as stack:
        noop = Noop()
        reader = stack.enter_context(made.reader(noop))
        reader.open()

        def fresh() -> float:
            # Rows that nobody has read yet, in both cases.
            made.tick()
            drain(reader)
            noop.count = 0
            _load(made, count)
            made.tick()
            took = drain(reader)
            _check(noop, count)
            return count / took

        def behind() -> float:
            with psycopg.connect(made.admin.info.dsn) as writing, psycopg.connect(made.admin.info.dsn) as looking:
                writing.execute(_ROWS, {"target": TARGET, "count": 1})
                looking.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                looking.execute("select count(*) from outbox.lane")
                try:
                    return fresh()
                finally:
                    writing.rollback()
                    looking.rollback()

        pair = compare(behind, fresh, pairs=3 if quick else 11)
    yield Figure("log-held.ratio", pair.ratio, "ratio of rows/s", Bar(">=", 0.9))
    yield Figure("log-held.held", pair.ours, "rows/s")
    yield Figure("log-held.free", pair.theirs, "rows/s")


def _load(made: Rig, count: int) -> None:
    for _ in range(0, count, CHUNK):
        made.admin.execute(_ROWS, {"target": TARGET, "count": min(CHUNK, count)})


def _check(noop: Noop, count: int) -> None:
    if noop.count != count:
        raise RuntimeError(f"{noop.count:,} intents arrived of {count:,}")
