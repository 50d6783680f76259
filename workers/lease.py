"""Keeps a lane's lease from a thread of its own, so that a long `apply` doesn't lose it.

The thread renews at a third of the lease. When another owner has taken the lane, or the database can't
be reached, the lane's deadline passes and the owner's next write raises `Fenced`.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

import psycopg

from outbox.database import Unreachable, connect
from outbox.errors import Fenced
from outbox.lane import Lane

log = logging.getLogger("outbox.lease")


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
        conn: psycopg.Connection[Any] | None = None
        try:
            while not self._stop.wait(self._lane.ttl / 3):
                conn = self._renew(conn)
                if conn is None and time.monotonic() >= self._lane.deadline:
                    return
        except Fenced as error:
            log.warning("%s", error)
            self._lane.deadline = 0.0
        finally:
            if conn is not None:
                conn.close()

    def _renew(self, conn: psycopg.Connection[Any] | None) -> psycopg.Connection[Any] | None:
        while not self._stop.is_set():
            try:
                if conn is None:
                    conn = connect(self._url, name=f"lease {self._lane}", check=False)
                self._lane.renew(conn)
            except (psycopg.OperationalError, Unreachable):
                if conn is not None:
                    conn.close()
                conn = None
                if time.monotonic() >= self._lane.deadline:
                    return None
                self._stop.wait(0.2)
            else:
                return conn
        return conn
