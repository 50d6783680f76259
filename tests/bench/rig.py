"""The rig: a database of its own, the real clock and the real reader, driven by hand.

The processes' own loops wait for each other; here the clock takes its tick when the benchmark says so, and
the reader steps until nothing is left. Connections are those of `outbox.database.connect`, as in production.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from outbox.database import connect
from outbox.lane import Lane, claim
from outbox.participant import Participant
from tests.bench.site import Site
from workers.clock import Clock
from workers.reader import Reader

_TTL = 3600.0
"""Seconds of a lease: nothing renews it here."""


class Rig:
    """A log, a clock, and readers for one target."""

    def __init__(self, site: Site, target: str, role: str) -> None:
        database = site.database()
        self.url = site.server.url(role, database)
        self.admin = psycopg.connect(site.server.url(database=database), autocommit=True)
        self.admin.execute("select outbox.register(%s)", (target,))
        self.target = target
        self._ticking = connect(self.url, name="bench clock")
        self._clock = Clock(self._ticking, self._claim(self._ticking, "clock"))

    @staticmethod
    def _claim(conn: psycopg.Connection[tuple[object, ...]], target: str) -> Lane:
        lane = claim(conn, target, 0, owner=uuid.uuid4(), ttl=_TTL)
        if lane is None:
            raise RuntimeError(f"the lane of {target} is taken: the last reader didn't release it")
        return lane

    def tick(self) -> None:
        """Let readers see what is committed."""
        self._clock.step()

    @contextmanager
    def reader(self, participant: Participant) -> Iterator[Reader]:
        """A reader that owns the lane and isn't open yet."""
        with connect(self.url, name="bench") as conn:
            lane = self._claim(conn, self.target)
            reader = Reader(conn, lane, participant)
            try:
                yield reader
            finally:
                participant.close()
                lane.release(conn)

    def close(self) -> None:
        """Let go of the database."""
        self._ticking.close()
        self.admin.close()


def drain(reader: Reader) -> float:
    """Step until nothing is left. → seconds."""
    start = time.perf_counter()
    while reader.step():
        pass
    return time.perf_counter() - start


@contextmanager
def rig(site: Site, target: str, role: str = "outbox_worker") -> Iterator[Rig]:
    """A rig, closed at the end; it works as `role`."""
    made = Rig(site, target, role)
    try:
        yield made
    finally:
        made.close()
