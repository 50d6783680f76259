"""`actor`, `actor-held`: actors that do nothing, in one process of eight threads.

`actor` holds the broker on the log against dramatiq on Redis with the same settings; against its in-memory broker, the
limit of dramatiq's own machinery; and against queues in Postgres with eight or ten jobs at a time, each in the way that
its manual says is fast. A turn is a fresh process that begins with a full queue (`tests.bench.actors`,
`tests.bench.queues`). The clock is a process beside it all the time. `actor.pgqueuer-100` is PgQueuer with a hundred
jobs at a time: its rate depends on that number above all.

`actor-held` holds the broker against itself, while another connection has written to the log and doesn't commit, and a
third one sits on a REPEATABLE READ snapshot, for the whole turn.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import psycopg

from tests.bench import redis
from tests.bench.figure import Bar, Figure
from tests.bench.latency import process
from tests.bench.pair import compare
from tests.bench.rival import NotInstalled, queue
from tests.bench.site import ROOT, Site

PATIENCE = 240.0
"""Seconds of a turn at most."""

COUNT = 20_000
"""Actors of a turn; a second or two."""


class Rival(NamedTuple):
    """What the broker is held against."""

    name: str
    rate: Callable[[], float]
    bar: Bar | None
    pairs: int


def run(what: str, broker: str, url: str, count: int) -> str:
    """What `tests.bench.actors` says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.actors", what, broker, url, str(count)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE,
    )  # fmt: skip
    return done.stdout


def rate(what: str, broker: str, url: str, count: int) -> float:
    """Per second."""
    return float(run(what, broker, url, count))


@contextmanager
def on_log(site: Site) -> Iterator[str]:
    """A database with a clock. → what a worker of actors connects as."""
    database = site.database()
    with process(site, database, "outbox", "work", "clock"):
        yield site.server.url("actor", database)


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Actors per second, against others."""
    with on_log(site) as url:
        rivals = [
            Rival("stub", partial(rate, "rate", "stub", "-", 2 * COUNT), Bar(">=", 0.4), 9),
            Rival("redis", partial(_redis, site), Bar(">=", 2), 7),
            Rival("pgqueuer", partial(queue, site, "pgqueuer", 4000, 10), Bar(">=", 3), 5),
            Rival("procrastinate", partial(queue, site, "procrastinate", 600), Bar(">=", 3), 5),
            Rival("pgqueuer-100", partial(queue, site, "pgqueuer", 10_000, 100), None, 5),
        ]
        for rival in rivals:
            try:
                ours = partial(rate, "rate", "outbox", url, COUNT)
                pair = compare(ours, rival.rate, pairs=3 if quick else rival.pairs, warm=False)
            except NotInstalled as error:
                print(error, file=sys.stderr)
                # Not measured is not met.
                yield Figure(f"actor.{rival.name}.ratio", 0.0, "not measured: it is not there", rival.bar)
                continue
            yield Figure(f"actor.{rival.name}.ratio", pair.ratio, "ratio of actors/s", rival.bar)
            yield Figure(f"actor.{rival.name}.ours", pair.ours, "actors/s")
            yield Figure(f"actor.{rival.name}.theirs", pair.theirs, "actors/s")


def _redis(site: Site) -> float:
    # Each time another one: it is as empty as the first.
    with redis.server(site) as url:
        return rate("rate", "redis", url, 5000)


def held(site: Site, *, quick: bool) -> Iterator[Figure]:
    """With a transaction held open, against without."""
    with on_log(site) as url:
        free = partial(rate, "rate", "outbox", url, COUNT)
        admin = url.replace("//actor@", "//postgres@")

        def behind() -> float:
            with psycopg.connect(admin) as writing, psycopg.connect(admin) as looking:
                writing.execute("select outbox.emit('actor.default', 'send', 'held')")
                looking.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                looking.execute("select count(*) from outbox.lane")
                try:
                    return free()
                finally:
                    writing.rollback()
                    looking.rollback()

        free()
        pair = compare(behind, free, pairs=3 if quick else 11)
    yield Figure("actor-held.ratio", pair.ratio, "ratio of actors/s", Bar(">=", 0.9))
    yield Figure("actor-held.held", pair.ours, "actors/s")
    yield Figure("actor-held.free", pair.theirs, "actors/s")
