"""A worker process: claims lanes, drains them, and survives the loss of the database.

    connect → claim → open → step … step → release

What interrupts that, and what follows:

* SIGTERM, Ctrl-C: the batch in hand is finished, the lane released, exit 0.
* the database is lost: everything is closed, the connection retried with backoff, the lane claimed again (at
  once: the lease is still ours) and its position read anew.
* the participant is down (`Unavailable`): the lane waits with backoff and keeps its lease; `outbox status` says
  what it waits for.
* another owner (`Fenced`): the lane is given up, and claimed again when it is free.
* another history (`NotThisLog`): the lane stops, says so in `outbox status`, and looks again from time to time.
* supervisord is gone: as SIGTERM, so that nothing runs that nobody would start again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import psycopg

from outbox import tick
from outbox.database import Unreachable, connect, reason
from outbox.errors import Fenced, NotReady, NotThisLog, Unavailable
from outbox.lane import Lane, claim
from outbox.participant import Participant
from outbox.retry import OUTAGE
from outbox.settings import Settings
from workers.clock import Clock, Housekeeping
from workers.lease import Lease
from workers.reader import Reader

log = logging.getLogger("outbox.worker")

CLAIM_EVERY = 0.2
"""Seconds between tries to claim a lane that somebody else has."""

WAKE = 0.25
"""Seconds that a reader waits for a notification before it looks by itself (a pooler may swallow them)."""

STOPPED_EVERY = 10.0
"""Seconds between looks whether a stopped lane can go on."""


class Stop(threading.Event):
    """Set by SIGTERM, SIGINT, and when the supervisor that started this process is gone."""

    def __init__(self) -> None:
        super().__init__()
        # supervisord says so to its children. Any other parent, such as a shell, may end as it likes.
        self._parent = os.getppid() if os.environ.get("SUPERVISOR_ENABLED") else None

    def install(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        return self

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self.set()

    def is_set(self) -> bool:
        if self._parent not in (None, os.getppid()):
            self.set()
        return super().is_set()


class Drainer:
    """Drains one lane of one target until told to stop, or until there is nothing left."""

    def __init__(
        self,
        settings: Settings,
        target: str,
        lane: int,
        make: Callable[[], Participant],
        stop: threading.Event,
        *,
        until_idle: bool = False,
    ) -> None:
        self._settings = settings
        self._target = target
        self._lane = lane
        self._make = make
        self._stop = stop
        self._until_idle = until_idle
        self._owner: uuid.UUID | None = None
        self._failures = 0

    @property
    def _name(self) -> str:
        return f"{self._target}/{self._lane}"

    def run(self) -> None:
        """Returns when stopped or idle. Raises `NotReady` when the database doesn't fit this code."""
        while not self._stop.is_set():
            try:
                with connect(self._settings.database, name=self._name) as conn:
                    if self._claimed(conn):
                        return
            except (psycopg.OperationalError, psycopg.InterfaceError, Unreachable) as error:
                self._failures += 1
                log.warning("%s: the database is lost (%s): trying again", self._name, reason(error))
                self._stop.wait(OUTAGE.wait(self._failures))

    def _claimed(self, conn: psycopg.Connection[Any]) -> bool:
        """Claim and drain on this connection. → whether the work is over."""
        while not self._stop.is_set():
            owner = uuid.uuid4()
            lane = claim(conn, self._target, self._lane, owner=owner, ttl=self._settings.ttl, mine=self._owner)
            if lane is None:
                self._stop.wait(CLAIM_EVERY)
                continue
            self._owner, self._failures = owner, 0
            log.info("%s: claimed, epoch %d", self._name, lane.epoch)
            try:
                with Lease(self._settings.database, lane):
                    if self._drain(conn, lane):
                        self._release(conn, lane)
                        return True
            except Fenced as error:
                log.warning("%s", error)
                # If it was the participant that refused this epoch, the lane is still ours: say so, and claim it
                # anew with a higher one. If there is a new owner, neither does anything.
                with suppress(Fenced):
                    lane.show(conn, "waiting", str(error))
                self._release(conn, lane)
                self._stop.wait(CLAIM_EVERY)
            except NotThisLog as error:
                log.error("%s: stopped: %s", self._name, error)  # noqa: TRY400 - the sentence is enough
                with suppress(Fenced):
                    lane.show(conn, "stopped", str(error))
                self._release(conn, lane)
                self._stop.wait(STOPPED_EVERY)
        return True

    def _release(self, conn: psycopg.Connection[Any], lane: Lane) -> None:
        lane.release(conn)
        self._owner = None

    def _drain(self, conn: psycopg.Connection[Any], lane: Lane) -> bool:
        reader = Reader(conn, lane, self._make())
        waits = 0
        opened = False
        conn.execute(f"listen {tick.CHANNEL}")
        try:
            while not self._stop.is_set():
                try:
                    if not opened:
                        reader.open()
                        opened = True
                    worked = reader.step()
                except Unavailable as error:
                    waits += 1
                    self._wait(conn, lane, waits, error)
                    continue
                if lane.state == "waiting":
                    lane.show(conn, "draining")
                    log.info("%s: goes on", self._name)
                waits = 0
                if worked:
                    continue
                if self._until_idle and reader.idle():
                    return True
                for _ in conn.notifies(timeout=WAKE, stop_after=1):
                    pass
            return True
        finally:
            # A failure to write the last position down is not an error: it is read again.
            with suppress(Exception):
                if opened:
                    reader.close()
                else:
                    reader.participant.close()

    def _wait(self, conn: psycopg.Connection[Any], lane: Lane, waits: int, error: Unavailable) -> None:
        """The circuit breaker: while the participant is down, wait with backoff and count nothing."""
        pause = OUTAGE.wait(waits, error.retry_after)
        if waits == 1:
            log.warning("%s: waits: %s", self._name, error)
        lane.check()
        lane.show(conn, "waiting", str(error))
        deadline = time.monotonic() + pause
        while not self._stop.is_set() and time.monotonic() < deadline:
            self._stop.wait(min(0.5, max(0.0, deadline - time.monotonic())))


def run_clock(settings: Settings, stop: threading.Event) -> None:
    """Take ticks until told to stop."""
    house = Housekeeping(settings, stop)
    house.start()
    owner: uuid.UUID | None = None
    failures = 0
    while not stop.is_set():
        try:
            with connect(settings.database, name="clock") as conn:
                mine, owner = owner, uuid.uuid4()
                lane = claim(conn, "clock", 0, owner=owner, ttl=settings.ttl, mine=mine)
                if lane is None:
                    owner = None
                    stop.wait(CLAIM_EVERY)
                    continue
                log.info("clock: claimed, epoch %d", lane.epoch)
                failures = 0
                with Lease(settings.database, lane):
                    try:
                        clock = Clock(conn, lane)
                    except NotThisLog as error:
                        lane.show(conn, "stopped", str(error))
                        raise
                    while not stop.is_set():
                        if not clock.step():
                            stop.wait(clock.pause)
                lane.release(conn)
        except Fenced as error:
            log.warning("%s", error)
            owner = None
        except NotThisLog as error:
            log.error("clock: stopped: %s", error)  # noqa: TRY400 - the sentence is enough
            stop.wait(STOPPED_EVERY)
        except (psycopg.OperationalError, psycopg.InterfaceError, Unreachable) as error:
            failures += 1
            log.warning("clock: the database is lost (%s): trying again", reason(error))
            stop.wait(OUTAGE.wait(failures))
    house.join()


def lanes_of(url: str, target: str) -> list[int]:
    """The numbers of a target's lanes. Raises `NotReady` for a target that is not registered."""
    with connect(url, name="worker") as conn:
        rows = conn.execute("select lane from outbox.lane where target = %s order by lane", (target,))
        found = [row[0] for row in rows]
        if not found:
            known = [row[0] for row in conn.execute("select target from outbox.participant order by target")]
            raise NotReady(f"no participant {target!r} is registered; there are: {', '.join(known)}")
        return found


def run(
    settings: Settings, target: str, make: Callable[[], Participant], stop: threading.Event, *, until_idle: bool
) -> None:
    """Drain all lanes of a target, each in a thread of its own if there are several."""
    lanes: list[int] = []
    failures = 0
    while not lanes:
        try:
            lanes = lanes_of(settings.database, target)
        except Unreachable as error:
            failures += 1
            log.warning("%s: %s", target, error)
            if stop.wait(OUTAGE.wait(failures)):
                return
    drainers = [Drainer(settings, target, lane, make, stop, until_idle=until_idle) for lane in lanes]
    if len(drainers) == 1:
        drainers[0].run()
        return
    failed: list[BaseException] = []

    def guarded(drainer: Drainer) -> None:
        try:
            drainer.run()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(drainer,), name=drainer._name) for drainer in drainers]  # noqa: SLF001 - same module
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
