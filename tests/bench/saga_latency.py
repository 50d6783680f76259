"""`saga-latency`: from the commit of a saga's start to its end, while the system is idle.

Everything is a process of its own, as in production: the clock, the engine, and a participant that does nothing. A
latency begins when COMMIT has returned to the application, and ends when the saga's row says `completed`, which
this one looks at every millisecond. `functions` are three steps that the engine does by itself. `intents` are three
steps at a participant: each goes through the log to it and its outcome through the log back, before the next begins.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator

import psycopg
from psycopg.types.json import Jsonb

from outbox import Saga
from tests.bench import sagas
from tests.bench.figure import Bar, Figure
from tests.bench.latency import PATIENCE, PAUSE, WARM, percentile, process
from tests.bench.noop import TARGET
from tests.bench.site import Site

LOOK = 0.001
"""Seconds between looks at a saga."""


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Percentiles in milliseconds."""
    samples = 30 if quick else 200
    database = site.database()
    with psycopg.connect(site.server.url(database=database), autocommit=True) as admin:
        admin.execute("select outbox.register(%s)", (TARGET,))
    with (
        psycopg.connect(site.server.url("app", database), autocommit=True) as conn,
        process(site, database, "outbox", "work", "clock"),
        process(site, database, "outbox", "work", "saga", role="saga", sagas=sagas.__name__),
        process(site, database, "tests.bench.noop"),
    ):
        for name, saga in (("functions", sagas.three), ("intents", sagas.sending)):
            rng = random.Random(1)
            latencies = []
            for number in range(-WARM, samples):
                time.sleep(rng.uniform(*PAUSE))
                took = _run(conn, saga)
                if number >= 0:
                    latencies.append(took * 1000)
            latencies.sort()
            yield Figure(f"saga-latency.{name}.p50", percentile(latencies, 0.5), "ms", Bar("<=", 60))
            yield Figure(f"saga-latency.{name}.p99", percentile(latencies, 0.99), "ms", Bar("<=", 200))


def _run(conn: psycopg.Connection[tuple[object, ...]], saga: Saga[dict[str, int]]) -> float:
    """Start one and wait for its end. → seconds."""
    number = uuid.uuid4()
    payload = Jsonb(saga.payload({"a": 1}))
    conn.execute("select outbox.emit('saga', 'start', %s, %s)", (str(number), payload))
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        row = conn.execute("select outbox.saga_state(%s)", (number,)).fetchone()
        if row is not None and row[0] == "completed":
            return time.monotonic() - began
        time.sleep(LOOK)
    raise RuntimeError(f"a saga was not completed within {PATIENCE:.0f} s: the clock or a worker doesn't run")
