"""Everything that runs: the embedded stack, the applications and the witness."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from tests.robustness.traffic import METADATA
from workers.postgres import DATABASE
from workers.stack import Stack

ROOT = Path(__file__).parents[2]

LIMIT = 180.0
"""Seconds that anything may take; a wait for a condition, never a pause."""

TTL = "2"
"""Seconds of a lease: short, so that it runs out often."""


def until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` returns, once that is true."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {LIMIT:.0f} s: {what}")


class Scene:
    """`open` brings it up, `close` leaves nothing behind."""

    def __init__(self, state: Path, seed: str, applications: int) -> None:
        self.state = state
        self.seed = seed
        self.applications = [f"app{n}" for n in range(applications)]
        self.stack = Stack(state)
        self.witness = state.with_name(f"{state.name}-witness")
        #: Our own children, by name.
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        own = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        self.environment = own | {"OUTBOX_STATE": str(state), "OUTBOX_TTL": TTL}

    def url(self, user: str) -> str:
        return self.stack.postgres.url(user, DATABASE)

    def open(self) -> None:
        before = os.environ.get("OUTBOX_TTL")
        os.environ["OUTBOX_TTL"] = TTL  # supervisord's environment is ours
        try:
            self.stack.up()
        finally:
            if before is None:
                del os.environ["OUTBOX_TTL"]
            else:
                os.environ["OUTBOX_TTL"] = before
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute("select outbox.register('witness')")
        engine = sa.create_engine(self.url("app").replace("postgresql://", "postgresql+psycopg://", 1))
        METADATA.create_all(engine)
        engine.dispose()
        for name in ("witness", *self.applications):
            self.start(name)

    def start(self, name: str) -> None:
        """The witness, or an application of a new name."""
        words = ("witness", str(self.witness)) if name == "witness" else ("traffic", name, self.seed)
        command = [sys.executable, "-m", f"tests.robustness.{words[0]}", *words[1:]]
        self.running[name] = subprocess.Popen(command, cwd=ROOT, env=self.environment)

    def worker(self, target: str, *words: str, **more: str) -> subprocess.Popen[bytes]:
        """Another worker, beside the one that supervisord runs."""
        command = [sys.executable, "-m", "outbox", "work", target, *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def silence(self) -> list[str]:
        """End the applications. → those that say that something was wrong."""
        names = [name for name in self.running if name.startswith("app")]
        for name in names:
            self.running[name].terminate()
        # One that was only just started ends before it has written anything.
        return [name for name in names if self.running.pop(name).wait(LIMIT) not in (0, -signal.SIGTERM)]

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        self.stack.down()
        self.witness.unlink(missing_ok=True)
