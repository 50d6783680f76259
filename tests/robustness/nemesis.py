"""The faults: a schedule drawn from a seed, in which each kind comes at least once.

An injection counts when its effect is seen: the process is gone, the lane has another owner, the decision is taken.
"""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg

from outbox import decision
from outbox.database import Unreachable, connect
from outbox.errors import NotReady
from tests.robustness.scene import LIMIT, Scene, until

WORKERS = ("clock", "index", "blob", "mail")

PAUSE = 0.4
"""Seconds between two faults, on average."""


class Nemesis:
    """Injects faults into a scene, one at a time."""

    def __init__(self, scene: Scene, seed: str) -> None:
        self.scene = scene
        self.random = random.Random(f"{seed}/nemesis")
        self.faults: dict[str, Callable[[], None]] = {
            **{f"kill {name}": partial(self._kill, name) for name in (*WORKERS, "mailserver")},
            **{f"terminate {name}": partial(self._terminate, name) for name in WORKERS},
            **{f"pause {name} beyond its lease": partial(self._pause, name) for name in WORKERS},
            "crash postgres": self._crash_postgres,
            "kill witness": partial(self._replace, "witness"),
            "kill an application": self._kill_application,
            "operator retries": partial(self._decide, "retry", "poison"),
            "operator skips poison": partial(self._decide, "skip", "poison"),
            "operator skips a blocked one": partial(self._decide, "skip", "blocked"),
        }
        self.injected: Counter[str] = Counter(dict.fromkeys(self.faults, 0))

    def run(self, seconds: float, done: Callable[[int, int], None], stop: threading.Event) -> None:
        """The whole schedule once, and then at random until `seconds` have passed, or `stop` is set."""
        deadline = time.monotonic() + seconds
        schedule = list(self.faults)
        self.random.shuffle(schedule)
        for number, name in enumerate(schedule):
            done(number, len(schedule))
            if stop.wait(self.random.uniform(0, 2 * PAUSE)):
                return
            self.inject(name)
        while time.monotonic() < deadline and not stop.wait(self.random.uniform(0, 2 * PAUSE)):
            self.inject(self.random.choice(list(self.faults)))

    def inject(self, name: str) -> None:
        """One fault. Raises `AssertionError` if it doesn't show an effect."""
        self.faults[name]()
        self.injected[name] += 1

    # --------------------------------------------------------------------------------------- processes

    def _running(self, name: str) -> int:
        return int(until(lambda: self.scene.stack.pids().get(name), f"{name} runs"))

    def _signal(self, name: str, number: signal.Signals) -> int:
        """→ the process that was signalled. Between two lives there is none: then the next one."""

        def sent() -> int | None:
            pid = self.scene.stack.pids().get(name)
            with suppress(NotReady):
                if pid:
                    self.scene.stack.kill(name, number)
                    return pid
            return None

        return int(until(sent, f"{name} can be signalled"))

    def _gone(self, name: str, pid: int) -> None:
        until(lambda: self.scene.stack.pids().get(name) not in (None, pid), f"{name} was started again")

    def _kill(self, name: str) -> None:
        self._gone(name, self._signal(name, signal.SIGKILL))

    def _terminate(self, name: str) -> None:
        self._gone(name, self._signal(name, signal.SIGTERM))

    def _crash_postgres(self) -> None:
        pid = self._running("postgres")
        self.scene.stack.restart_postgres_immediately()
        assert self._running("postgres") != pid

    def _pause(self, name: str) -> None:
        """A process that sleeps through its lease while another takes over, and then wakes up."""
        until(lambda: self._owner(name) == self.scene.stack.pids().get(name), f"{name} has its lane")
        self._signal(name, signal.SIGSTOP)
        rival: subprocess.Popen[bytes] | None = None
        try:
            before = self._epoch(name)
            rival = self.scene.worker(name)
            until(lambda: self._epoch(name) > before, f"another owner of {name}")
        finally:
            with suppress(NotReady):
                self.scene.stack.kill(name, signal.SIGCONT)
            if rival is not None:
                rival.terminate()
                with suppress(subprocess.TimeoutExpired):
                    rival.wait(LIMIT)
                rival.kill()
                rival.wait()

    def _owner(self, name: str) -> int | None:
        """The process that has the lane."""
        found = self._ask("select place from outbox.lane where target = %s", (name,))
        return int(found[0][0].split("/")[3]) if found[0][0] else None

    def _epoch(self, name: str) -> int:
        return int(self._ask("select max(epoch) from outbox.lane where target = %s", (name,))[0][0])

    def _replace(self, name: str) -> None:
        process = self.scene.running[name]
        process.kill()
        process.wait()
        self.scene.start(name)

    def _kill_application(self) -> None:
        name = self.random.choice([name for name in self.scene.running if name.startswith("app")])
        process = self.scene.running.pop(name)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        # A new one under a new name: its transactions are its own.
        self.scene.start(f"{name}+")

    # --------------------------------------------------------------------------------------- operators

    def _decide(self, action: decision.Action, reason: str) -> None:
        """What an operator does with one parked intent, once there is one, and while workers are at it."""

        def decided() -> bool:
            try:
                with connect(self.scene.url("outbox_operator"), name="robustness") as conn:
                    found = decision.find(conn, decision.Choice(target="index", reasons=[reason]))
                    chosen = [self.random.choice(found)["id"]] if found else []
                    return any(one.refused is None for one in decision.decide(conn, action, chosen, note="robustness"))
            except (Unreachable, psycopg.OperationalError):
                return False

        until(decided, f"an operator could {action} one of {reason}")

    def _ask(self, query: str, parameters: tuple[Any, ...]) -> list[Any]:
        def answer() -> list[Any] | None:
            try:
                with connect(self.scene.url("outbox_worker"), name="robustness") as conn:
                    return conn.execute(query, parameters).fetchall()
            except (Unreachable, psycopg.OperationalError):
                return None

        found: list[Any] = until(answer, "the database answers")
        return found
