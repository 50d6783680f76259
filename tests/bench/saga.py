"""Sagas of three steps that do nothing, against DBOS workflows of three steps on the same server in the same run.

DBOS is installed into an environment of its own when this runs, from the package index that pip uses; where that is
out of reach, its figures and the ratio are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg

from outbox import Saga, lane
from outbox.saga.definition import _new_id
from outbox.saga.registry import Definitions, register
from outbox.settings import Settings
from tests.bench.figure import Bar, Figure
from tests.bench.site import ROOT, Site
from workers.clock import Clock
from workers.engine import Engine
from workers.reader import Reader

BAR = Bar(">=", 20.0)
KEPT_BAR = Bar(">=", 0.9)
LATENCY = (Bar("<=", 60.0), Bar("<=", 200.0))

noop: Saga[dict[str, Any]] = Saga("noop", dict)
for _name in ("a", "b", "c"):
    noop.function(name=_name)(lambda _session, _run: None).undo(lambda _session, _run: None)

_START = json.dumps({"name": "noop", "version": 1, "input": {}})

_DBOS = """
import sys, time
from dbos import DBOS
DBOS(config={"name": "bench", "system_database_url": sys.argv[1], "log_level": "ERROR", "run_admin_server": False})
@DBOS.step()
def nothing(): return None
@DBOS.workflow()
def three():
    nothing(); nothing(); nothing()
DBOS.launch()
three()
n = int(sys.argv[2])
began = time.perf_counter()
for handle in [DBOS.start_workflow(three) for _ in range(n)]:
    handle.get_result()
print("rate", n / (time.perf_counter() - began))
DBOS.destroy()
"""


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Rate beside DBOS, rate with finished ones kept, and latency on an idle system."""
    count = 2000 if quick else 10_000
    database = site.database()
    ours = [_rate(site, database, count) for _ in range(3)]
    yield Figure("saga.rate", statistics.median(ours), "sagas/s")
    theirs = _dbos(site, 100 if quick else 300)
    if theirs is not None:
        yield Figure("saga.dbos", theirs, "workflows/s")
        yield Figure("saga.ratio", statistics.median(ours) / theirs, "ratio", BAR)
    _keep(site, database, 100_000 if quick else 1_000_000)
    kept = [_rate(site, database, count) for _ in range(3)]
    yield Figure("saga.kept", statistics.median(kept) / statistics.median(ours), "ratio", KEPT_BAR)
    yield from _latency(site, 100 if quick else 500)


def _rate(site: Site, database: str, count: int) -> float:
    """Sagas that one engine ends in a second, from their start in the log."""
    definitions: Definitions = {}
    register(definitions, noop)
    url = site.server.url("saga", database)
    with psycopg.connect(url, autocommit=True) as conn, psycopg.connect(url, autocommit=True) as clock_conn:
        conn.execute(
            "insert into outbox.log (target, action, key, payload) "
            "select 'saga', 'start', key, %s from unnest(%s) as key",
            (_START, [str(_new_id()) for _ in range(count)]),
        )
        owned = lane.claim(clock_conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
        mine = lane.claim(conn, "saga", 0, owner=uuid.uuid4(), ttl=600)
        assert owned is not None
        assert mine is not None
        Clock(clock_conn, owned).step()
        reader = Reader(conn, mine, Engine(Settings(url, None, None, "smtp://127.0.0.1:1"), definitions))
        reader.open()
        began = time.perf_counter()
        while reader.step():
            pass
        seconds = time.perf_counter() - began
        open_ = conn.execute("select count(*) from outbox.saga where ended_at is null").fetchone()
        assert open_ == (0,)
        reader.close()
        mine.release(conn)
        owned.release(clock_conn)
    return count / seconds


def _keep(site: Site, database: str, count: int) -> None:
    with psycopg.connect(site.server.url(database=database), autocommit=True) as conn:
        conn.execute(
            "insert into outbox.saga (id, name, version, shape, state, decision, input, ended_at) "
            "select id, 'noop', 1, %s, 'completed', 'commit', '{}', now() from unnest(%s) as id",
            (noop.plan.shape, [_new_id() for _ in range(count)]),
        )
        conn.execute(
            "insert into outbox.saga_step (saga, step, place, state, round, began_at, ended_at) "
            "select id, step, 0, 'done', 1, now(), now() from outbox.saga, unnest(array['a', 'b', 'c']) as step "
            "on conflict do nothing"
        )
        conn.execute("vacuum analyze outbox.saga")
        conn.execute("vacuum analyze outbox.saga_step")


def _dbos(site: Site, count: int) -> float | None:
    home = site.home / "dbos"
    python = home / "bin" / "python"
    venv = subprocess.run([sys.executable, "-m", "venv", str(home)], check=False, capture_output=True)
    failed = venv.returncode or subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "dbos", "psycopg[binary]"],
        check=False, capture_output=True, timeout=600,
    ).returncode  # fmt: skip
    if failed:
        print("DBOS can't be installed here: its figures are left out", file=sys.stderr)
        return None
    with psycopg.connect(site.server.url(), autocommit=True) as conn:
        conn.execute("create database dbos")
    url = site.server.url(database="dbos").replace("postgresql://", "postgresql+psycopg://")
    done = subprocess.run(
        [str(python), "-c", _DBOS, url, str(count)], check=False, capture_output=True, text=True, timeout=600
    )
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("rate ")]
    if not found:
        raise RuntimeError(f"DBOS did not run: {done.stderr[-500:]}")
    return float(found[0])


def _latency(site: Site, count: int) -> Iterator[Figure]:
    """From COMMIT of the start until the end is visible, one saga at a time, with the workers' own processes."""
    database = site.database()
    url = site.server.url("saga", database)
    environment = {**os.environ, "OUTBOX_DATABASE": url, "OUTBOX_SAGAS": "tests.bench.saga"}
    command = [sys.executable, "-m", "outbox", "work"]
    workers = [
        subprocess.Popen([*command, name], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        for name in ("clock", "saga")
    ]
    try:
        with psycopg.connect(url, autocommit=True) as conn:
            times = [_once(conn) for _ in range(count + 20)][20:]
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    cut = statistics.quantiles(times, n=100)
    yield Figure("saga.latency-p50", cut[49] * 1000, "ms", LATENCY[0])
    yield Figure("saga.latency-p99", cut[98] * 1000, "ms", LATENCY[1])


def _once(conn: psycopg.Connection[Any]) -> float:
    saga = str(uuid.uuid4())
    conn.execute("select outbox.emit('saga', 'start', %s, %s)", (saga, _START))
    began = time.perf_counter()
    while conn.execute("select outbox.saga_state(%s)", (saga,)).fetchone() != ("completed",):
        time.sleep(0.001)
        if time.perf_counter() - began > 90:
            raise RuntimeError("the saga has not ended within 90 s")
    return time.perf_counter() - began
