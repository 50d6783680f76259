"""`latency`: from commit to effect while the system is idle.

Everything is a process of its own, as in production: the clock, a worker with a participant that does nothing but
note the time, and this one, which commits one intent now and then. A latency begins when COMMIT has returned to
the application, and ends when the participant is called.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import psycopg

from tests.bench.figure import Bar, Figure
from tests.bench.noop import TARGET
from tests.bench.site import ROOT, Site

PAUSE = (0.05, 0.3)
"""Seconds between commits, at least and at most."""

WARM = 10
"""Commits at first that are not counted: statements are prepared after a few times."""

PATIENCE = 30.0
"""Seconds for the processes to start, and to finish."""


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Percentiles in milliseconds."""
    samples = 30 if quick else 200
    database = site.database()
    with psycopg.connect(site.server.url(database=database), autocommit=True) as admin:
        admin.execute("select outbox.register(%s)", (TARGET,))
    with (
        psycopg.connect(site.server.url("app", database)) as conn,
        process(site, database, "outbox", "work", "clock"),
        process(site, database, "tests.bench.noop") as worker,
    ):
        wait(conn, _emit(conn, "first")[2])
        rng = random.Random(1)
        sent: dict[str, float] = {}
        commits: list[float] = []
        xid = 0
        for number in range(-WARM, samples):
            time.sleep(rng.uniform(*PAUSE))
            before, after, xid = _emit(conn, f"key/{number}")
            if number >= 0:
                sent[f"key/{number}"] = after
                commits.append(after - before)
        wait(conn, xid)
        worker.terminate()
        output = worker.communicate(timeout=PATIENCE)[0]
    arrived = {key: float(at) for key, at in map(str.split, output.splitlines())}
    latencies = sorted(arrived[key] - at for key, at in sent.items())
    yield Figure("latency.p50", percentile(latencies, 0.5) * 1000, "ms", Bar("<=", 10))
    yield Figure("latency.p99", percentile(latencies, 0.99) * 1000, "ms", Bar("<=", 40))
    yield Figure("latency.max", latencies[-1] * 1000, "ms")
    yield Figure("latency.commit", median(commits) * 1000, "ms")


def percentile(ordered: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def _emit(conn: psycopg.Connection[tuple[object, ...]], key: str) -> tuple[float, float, int]:
    """Commit an intent. → when COMMIT was sent, when it returned, and the transaction."""
    conn.execute("select outbox.emit(%s, 'put', %s)", (TARGET, key))
    row = conn.execute("select pg_current_xact_id()::text").fetchone()
    assert row is not None
    before = time.monotonic()
    conn.commit()
    return before, time.monotonic(), int(str(row[0]))


def wait(conn: psycopg.Connection[tuple[object, ...]], xid: int) -> None:
    """Until the worker is behind this transaction."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        row = conn.execute("select outbox.reached(%s::text::xid8, %s)", (str(xid), TARGET)).fetchone()
        conn.commit()
        if row is not None and row[0]:
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing arrived within {PATIENCE:.0f} s: the clock or the worker doesn't run")


@contextmanager
def process(
    site: Site, database: str, *words: str, role: str = "outbox_worker", sagas: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """`python -m words…`, told to end at the end; what it said on stderr is printed if there was an error."""
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": site.server.url(role, database),
        "OUTBOX_SAGAS": sagas,
        # Databases of one template look like copies of one log: whoever has seen the one would stop at the other.
        "OUTBOX_STATE": str(site.home / f"state-{database}"),
        "OUTBOX_BLOBS": str(site.home / "none"),
    }
    said = site.folder()
    with said.open("w", encoding="utf-8") as errors:
        started = subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        yield started
    except Exception:
        print(f"{' '.join(words)} said:\n{said.read_text(encoding='utf-8')}", file=sys.stderr)
        raise
    finally:
        if started.poll() is None:
            started.terminate()
        try:
            started.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
