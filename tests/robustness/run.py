"""One run: traffic under faults, then quiet, then everything is drained and checked."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from outbox import decision, status
from outbox.database import Unreachable, connect
from outbox.search import Index
from tests.robustness.check import Fault, Found, compare, documents, look, mails, operations, skipped
from tests.robustness.model import expected
from tests.robustness.nemesis import Nemesis
from tests.robustness.report import Report
from tests.robustness.scene import LIMIT, Scene

DRAIN_LIMIT = 300.0
"""Seconds after the last fault within which everything must have drained (I10)."""

APPLICATIONS = 3


def run(
    seed: str, seconds: float, *, keep: bool = False, done: Callable[[str, int, int], None] = lambda *_: None,
    stop: threading.Event | None = None,
) -> Report:  # fmt: skip
    """A run of about `seconds`, or longer if all planned faults take longer. Raises nothing for a broken promise."""
    began = time.monotonic()
    report = Report(seed)
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    scene = Scene(home / "state", seed, APPLICATIONS)
    nemesis = Nemesis(scene, seed)
    report.injected = nemesis.injected
    try:
        done("starting", 0, 0)
        scene.open()
        nemesis.run(seconds, lambda n, of: done("injecting faults", n, of), stop or threading.Event())
        report.faults += [Fault("commit", f"{name} was told wrong, or failed") for name in scene.silence()]
        quiet = time.monotonic()
        done("draining", 0, 0)
        drain(scene, report)
        report.drain_seconds = time.monotonic() - quiet
        done("checking", 0, 0)
        _check(scene, report)
    finally:
        scene.close()
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
    report.seconds = time.monotonic() - began
    return report


def drain(scene: Scene, report: Report) -> None:
    """Wait until every lane has passed everything; an operator skips the poison as it shows up."""
    deadline = time.monotonic() + DRAIN_LIMIT
    while time.monotonic() < deadline:
        try:
            with connect(scene.url("outbox_operator"), name="robustness") as conn:
                poison = decision.find(conn, decision.Choice(reasons=["poison"]))
                decision.decide(conn, "skip", [row["id"] for row in poison], note="after the run")
                if not poison and not _left(conn):
                    return
        except (Unreachable, psycopg.OperationalError):
            pass
        time.sleep(0.1)
    report.faults.append(Fault("progress", f"not drained within {DRAIN_LIMIT:.0f} s (I10)"))


def _left(conn: psycopg.Connection[Any]) -> int:
    """Intents that are neither applied nor skipped, or not shown by a tick yet."""
    picture = status.read(conn)
    parked = sum(row["count"] for row in picture.parked)
    unseen = max(0, picture.log["last_id"] - picture.log["high"])
    return int(parked + unseen + sum(lane["behind"] for lane in picture.lanes))


def _check(scene: Scene, report: Report) -> None:
    with psycopg.connect(scene.url("postgres"), autocommit=True) as conn:
        committed = operations(conn)
        wanted = expected(committed, skipped(conn))
        (row,) = conn.execute("select count(*) from transaction").fetchall()
        report.transactions = row[0]
        report.operations = Counter(each.kind for each in committed)
        found = look(conn, scene.state, scene.witness)
        _total(scene, found)
        _replay(scene, found)
    report.faults += compare(wanted, found)


def _total(scene: Scene, found: Found) -> None:
    """What a reader of the index sums up (I9)."""
    with Index(scene.state / "index") as index:
        hits = [index.get(key) for key, _ in found.documents]
    found.total = sum(hit.data["amount"] for hit in hits if hit is not None)


def _replay(scene: Scene, found: Found) -> None:
    """An empty index is filled from the log, by the same worker (I8)."""
    scene.stack.supervisor.stop("index")
    replayed = scene.state.with_name(f"{scene.state.name}-replayed")
    worker = scene.worker("index", "--until-idle", OUTBOX_INDEX=str(replayed))
    try:
        assert worker.wait(LIMIT) == 0
    finally:
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    found.replayed = documents(replayed)
    found.mails_replayed = mails(scene.state / "mail")
