"""Kills workers, again and again, and crashes Postgres once."""

from __future__ import annotations

import random
import threading
from contextlib import suppress

from outbox.errors import NotReady
from workers.stack import Stack

VICTIMS = ("clock", "index", "blob", "mail", "saga")


class Nemesis:
    """A thread that kills a random worker every `every` seconds, from `start` until `stop`."""

    def __init__(self, stack: Stack, every: float, *, seed: int | None = None) -> None:
        self._stack = stack
        self._every = every
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemesis", daemon=True)
        #: Processes killed so far, Postgres included.
        self.kills = 0

    def start(self) -> None:
        if self._every > 0:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def bounce_postgres(self) -> None:
        """Crash Postgres (immediate shutdown) and wait until it has recovered."""
        self._stack.restart_postgres_immediately()
        self.kills += 1

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            victim = self._random.choice(VICTIMS)
            # Between two lives there is nothing to kill.
            with suppress(NotReady):
                if victim in self._stack.pids():
                    self._stack.kill(victim)
                    self.kills += 1
