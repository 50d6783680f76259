"""Keeps a lane's lease from a thread of its own, so that a long `apply` doesn't lose it.

The thread has a connection of its own, opened at once, and renews at a third of the lease. An answer that doesn't come
within that time counts as a lost connection, and a new one is made, so that packets that are swallowed on the way cost
one renewal and not the lane. When renewing fails for too long, the lane's deadline passes, and its owner asks for
itself before the next effect (`Lane.check`); when another owner has the lane, it is told so there.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psycopg

from outbox.database import Connection, Unreachable, connect
from outbox.errors import Fenced
from outbox.lane import RENEW_SHARE, Lane, now

PATIENCE_LEAST = 1.0
"""Seconds to wait for an answer, however short the lease: making a connection costs more than that."""

AGAIN_EVERY = 0.2
"""Seconds between tries to reach a database that is lost."""


class Lease:
    """`with Lease(url, lane):` the lane is renewed until the end of the block."""

    def __init__(self, url: str, lane: Lane) -> None:
        self._url = url
        self._lane = lane
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease {lane}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        patience = max(PATIENCE_LEAST, RENEW_SHARE * self._lane.ttl)
        while not self._stop.is_set():
            try:
                with connect(self._url, name=f"lease {self._lane}", check=False, patience=patience) as conn:
                    self._keep(conn)
            except Fenced:
                # The next check asks the database, and says so where the work is done.
                self._lane.deadline = 0.0
                return
            except (psycopg.Error, Unreachable):
                self._stop.wait(AGAIN_EVERY)

    def _keep(self, conn: Connection) -> None:
        while not self._stop.wait(self._lane.renewal - now()):
            self._lane.renew(conn)
