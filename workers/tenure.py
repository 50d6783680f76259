"""A tenure: how a process comes to own a lane, keeps it, and comes back to it after whatever interrupts it.

    connect → claim → lease → work … → release

Used by `workers.process` for every lane, the clock's too. What interrupts the work, and what follows:

* the database is lost: everything is closed, the connection retried with backoff, the lane claimed again (at
  once: the lease is still ours).
* another owner (`Fenced`): the lane is given up, and claimed again when it is free.
* another history (`NotThisLog`): the lane stops, says so in `outbox status`, and looks again from time to time. If
  the log went back (`WentBack`), all lanes stop.

A worker that waits for a lane keeps its connection: a warm spare costs one cheap statement every `CLAIM_EVERY`.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress

import psycopg

from outbox import era
from outbox.database import Connection, Unreachable, connect, reason
from outbox.errors import Fenced, NotThisLog, WentBack
from outbox.lane import Lane, claim
from outbox.retry import OUTAGE
from outbox.settings import Settings
from outbox.watermark import Watermark
from workers.lease import Lease

log = logging.getLogger("outbox.worker")

CLAIM_EVERY = 0.2
"""Seconds between tries to claim a lane that somebody else has."""

STOPPED_EVERY = 10.0
"""Seconds between looks whether a stopped lane can go on."""

PATIENCE_LEASES = 2.0
"""Leases that a worker waits for an answer of the database, and the database for the worker in a transaction. The
lease's own connection may be well while this one is dead: the lane must not be kept for nothing."""

PATIENCE_LEAST = 10.0
"""Seconds: short leases don't make the machine faster."""


class Tenure:
    """One lane of one target, for as long as `stop` isn't set."""

    def __init__(self, settings: Settings, target: str, lane: int, stop: threading.Event) -> None:
        self.name = f"{target}/{lane}"
        self._settings = settings
        self._target = target
        self._lane = lane
        self._stop = stop
        #: Whoever works notes here how far the lane is.
        self.watermark = Watermark(settings.state, self.name)
        self._owner: uuid.UUID | None = None
        self._failures = 0

    def run(self, work: Callable[[Connection, Lane], None]) -> None:
        """Own the lane and `work`, until that returns or `stop` is set. Then the lane is released.

        Raises `NotReady` when the database doesn't fit this code.
        """
        while not self._stop.is_set():
            conn = None
            try:
                with connect(self._settings.database, name=self.name, patience=patience(self._settings)) as conn:
                    if self._on(conn, work):
                        return
            except (psycopg.Error, Unreachable) as error:
                if not lost(error, conn):
                    raise
                self._failures += 1
                log.warning("%s: the database is lost (%s): trying again", self.name, reason(error))
                self._stop.wait(OUTAGE.wait(self._failures))

    def _on(self, conn: Connection, work: Callable[[Connection, Lane], None]) -> bool:
        """Claim and work on this connection. → whether the work is over."""
        while not self._stop.is_set():
            owner = uuid.uuid4()
            lane = claim(conn, self._target, self._lane, owner=owner, ttl=self._settings.ttl, mine=self._owner)
            if lane is None:
                self._stop.wait(CLAIM_EVERY)
                continue
            self._owner, self._failures = owner, 0
            log.info("%s: claimed, epoch %d", self.name, lane.epoch)
            try:
                self.watermark.check(conn, era.check(conn))
                with Lease(self._settings.database, lane):
                    work(conn, lane)
                self._release(conn, lane)
            except Fenced as error:
                log.warning("%s", error)
                # If it was the participant that refused this epoch, the lane is still ours: say so, and claim it
                # anew with a higher one. If there is a new owner, neither does anything.
                self._give_up(conn, lane, "waiting", str(error))
                self._stop.wait(CLAIM_EVERY)
            except NotThisLog as error:
                log.error("%s: stopped: %s", self.name, error)  # noqa: TRY400 - the sentence is enough
                if isinstance(error, WentBack):
                    # Whoever remembers less must not go on either.
                    era.halt(conn, error.says)
                self._give_up(conn, lane, "stopped", str(error))
                self._stop.wait(STOPPED_EVERY)
            else:
                return True
        return True

    def _give_up(self, conn: Connection, lane: Lane, state: str, why: str) -> None:
        with suppress(Fenced):
            lane.show(conn, state, why)
        self._release(conn, lane)

    def _release(self, conn: Connection, lane: Lane) -> None:
        lane.release(conn)
        self._owner = None


def patience(settings: Settings) -> float:
    """Seconds that a worker has patience with its database (`outbox.database.connect`)."""
    return max(PATIENCE_LEAST, PATIENCE_LEASES * settings.ttl)


def lost(error: Exception, conn: Connection | None = None) -> bool:
    """Whether it is the connection that failed. One that the server has ended may report that as an error of any
    kind, such as the time that a transaction was left lying."""
    known = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | Unreachable)
    return known or (conn is not None and conn.closed)
