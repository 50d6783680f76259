"""The keeper: renews the leases of a process's lanes, and its place among the consumers, from a thread of its own.

So a long actor, or a delivery that waits for the database, doesn't lose them. After `workers.lease`, for many lanes on
one connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from uuid import UUID

import psycopg

from outbox import sql
from outbox.database import Unreachable, connect
from outbox.errors import Fenced
from outbox.lane import RENEW_SHARE, SAFE_SHARE, Lane, now
from workers.lease import AGAIN_EVERY, PATIENCE_LEAST


class Keeper:
    """Runs from `start` to `stop`."""

    def __init__(self, url: str, owner: UUID, ttl: float, lanes: Callable[[], Sequence[Lane]]) -> None:
        self._url = url
        self._owner = owner
        self._ttl = ttl
        self._lanes = lanes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actor leases", daemon=True)
        #: `now()` until which this process certainly takes part.
        self.deadline = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def attends(self) -> bool:
        """Whether this process is certainly still known as a consumer."""
        return now() < self.deadline

    def attended(self, sent: float) -> None:
        """It was, by a statement that was sent at `sent`."""
        self.deadline = max(self.deadline, sent + SAFE_SHARE * self._ttl)

    def _run(self) -> None:
        patience = max(PATIENCE_LEAST, RENEW_SHARE * self._ttl)
        while not self._stop.is_set():
            try:
                with connect(self._url, name="actor leases", check=False, patience=patience) as conn:
                    while not self._stop.wait(RENEW_SHARE * self._ttl / 2):
                        self._renew(conn)
            except (psycopg.Error, Unreachable):
                self._stop.wait(AGAIN_EVERY)

    def _renew(self, conn: psycopg.Connection[object]) -> None:
        sent = now()
        if conn.execute(sql.load("actor_renew"), {"owner": self._owner, "ttl": self._ttl}).rowcount:
            self.attended(sent)
        for lane in self._lanes():
            try:
                if now() >= lane.renewal:
                    lane.renew(conn)
            except Fenced:
                # Whoever begins one of its messages finds out there.
                lane.deadline = 0.0
