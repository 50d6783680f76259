"""A worker process: owns lanes, drains them, and survives the loss of the database.

    own (`workers.tenure`) → open → step … step → release

What interrupts that, and what follows, besides what is said at `workers.tenure`:

* SIGTERM, Ctrl-C: the batch in hand is finished, the lane released, exit 0.
* the participant is down (`Unavailable`): the lane waits with backoff and keeps its lease; `outbox status` says
  what it waits for.
* supervisord is gone: as SIGTERM, so that nothing runs that nobody would start again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NamedTuple

import psycopg

from outbox import tick
from outbox.database import Connection, Unreachable, connect, reason
from outbox.errors import NotReady, Unavailable
from outbox.lane import Lane, NoLane
from outbox.participant import Participant
from outbox.retry import OUTAGE
from outbox.settings import Settings
from workers.clock import Clock, Housekeeping
from workers.reader import Reader
from workers.tenure import Tenure, lost, patience

log = logging.getLogger("outbox.worker")

WAKE = 0.25
"""Seconds that a reader waits for a notification before it looks by itself."""

POLL = 0.05
"""The same where a pooler swallows all notifications."""


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
        lanes: int,
        until_idle: bool = False,
    ) -> None:
        self._lanes = lanes
        self._tenure = Tenure(settings, target, lane, stop)
        self.name = self._tenure.name
        self._make = make
        self._stop = stop
        self._until_idle = until_idle

    def run(self) -> None:
        """Returns when stopped or idle. Raises `NotReady` when the database doesn't fit this code, `Relaned` when the
        lane is no more, or one of another number."""
        try:
            self._tenure.run(self._claimed)
        except NoLane as error:
            raise Relaned(f"{self.name} is no more") from error

    def _claimed(self, conn: Connection, lane: Lane) -> None:
        if lane.lanes != self._lanes:
            # Another thread's, in a moment.
            lane.release(conn)
            raise Relaned(f"{lane.target} has {lane.lanes} lanes by now, and had {self._lanes}")
        self._drain(conn, lane)

    def _drain(self, conn: Connection, lane: Lane) -> None:
        reader = Reader(conn, lane, self._make())
        waits = 0
        opened = False
        if not conn.pooled:
            conn.execute(f"listen {tick.CHANNEL}")
        try:
            while not self._stop.is_set():
                try:
                    if not opened:
                        reader.open()
                        opened = True
                    worked = reader.step()
                    self._tenure.watermark.note(reader.position)
                except Unavailable as error:
                    waits += 1
                    if opened:
                        reader.note()
                    self._wait(conn, lane, waits, error)
                    continue
                if lane.state == "waiting":
                    lane.show(conn, "draining")
                    log.info("%s: goes on", self.name)
                waits = 0
                if worked:
                    continue
                if self._until_idle and reader.idle():
                    return
                self._listen(conn, lane, reader)
        finally:
            self._close(reader, opened)

    def _close(self, reader: Reader, opened: bool) -> None:
        # A failure to write the last position down is not an error: it is read again.
        with suppress(Exception):
            if not opened:
                reader.participant.close()
                return
            self._tenure.watermark.note(reader.position, at_once=True)
            reader.close()

    def _listen(self, conn: Connection, lane: Lane, reader: Reader) -> None:
        """Wait until there may be something new."""
        if conn.pooled:
            self._stop.wait(POLL)
            return
        # All of them first: while they come, the connection can't be asked anything.
        for notice in list(conn.notifies(timeout=WAKE, stop_after=1)):
            if notice.payload == tick.DECIDED:
                # Perhaps that the lane is another one's.
                lane.renew(conn)
                reader.decided()
            elif notice.payload == tick.HALTED:
                lane.deadline = 0.0  # before the next effect the database is asked

    def _wait(self, conn: Connection, lane: Lane, waits: int, error: Unavailable) -> None:
        """The circuit breaker: while the participant is down, wait with backoff and count nothing."""
        pause = OUTAGE.wait(waits, error.retry_after)
        if waits == 1:
            log.warning("%s: waits: %s", self.name, error)
        lane.check(conn)
        lane.show(conn, "waiting", str(error))
        deadline = time.monotonic() + pause
        while not self._stop.is_set() and time.monotonic() < deadline:
            self._stop.wait(min(0.5, max(0.0, deadline - time.monotonic())))


def run_clock(settings: Settings, stop: threading.Event) -> None:
    """Take ticks until told to stop."""
    house = Housekeeping(settings, stop)
    house.start()

    tenure = Tenure(settings, "clock", 0, stop)

    def work(conn: Connection, lane: Lane) -> None:
        clock = Clock(conn, lane)
        house.allowed.set()
        try:
            while not stop.is_set():
                tenure.watermark.note(clock.position)
                if not clock.step():
                    stop.wait(clock.pause)
        finally:
            house.allowed.clear()
            tenure.watermark.note(clock.position, at_once=True)

    tenure.run(work)
    house.join()


class Turn(threading.Event):
    """Set when the process is to stop, or the drainers of one target are to end together."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._process = stop

    def is_set(self) -> bool:
        return super().is_set() or self._process.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = WAKE if deadline is None else min(WAKE, deadline - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True


class Relaned(NotReady):
    """The target has another number of lanes than when its drainers were started: a resilver has changed it."""


class Lanes(NamedTuple):
    """Lanes to drain."""

    #: Their numbers.
    ours: list[int]
    #: How many the target has.
    total: int


def lanes_of(settings: Settings, target: str, lane: int | None = None) -> Lanes:
    """A target's lanes, or just `lane`. Raises `NotReady` for what is not registered."""
    with connect(settings.database, name="worker", patience=patience(settings)) as conn:
        rows = conn.execute("select lane from outbox.lane where target = %s order by lane", (target,))
        found = [row[0] for row in rows]
        if not found:
            known = [row[0] for row in conn.execute("select target from outbox.participant order by target")]
            raise NotReady(f"no participant {target!r} is registered; there are: {', '.join(known)}")
        if lane is not None and lane not in found:
            raise NotReady(f"{target} has no lane {lane}: it has {len(found)}, counted from 0 (`outbox register`)")
        return Lanes(found if lane is None else [lane], len(found))


def _found(settings: Settings, target: str, lane: int | None, stop: threading.Event) -> Lanes:
    """`lanes_of`, when the database can be asked; none if it is stopped before."""
    failures = 0
    while not stop.is_set():
        try:
            return lanes_of(settings, target, lane)
        except (psycopg.Error, Unreachable) as error:
            if not lost(error):
                raise
            failures += 1
            log.warning("%s: the database can't be asked for the lanes (%s): trying again", target, reason(error))
            stop.wait(OUTAGE.wait(failures))
    return Lanes([], 0)


def run(
    settings: Settings,
    target: str,
    make: Callable[[], Participant],
    stop: threading.Event,
    *,
    until_idle: bool,
    lane: int | None = None,
) -> None:
    """Drain one lane of a target, or all of them, each in a thread of its own if there are several."""
    while not stop.is_set():
        lanes = _found(settings, target, lane, stop)
        try:
            _turn(settings, target, lanes, make, Turn(stop), until_idle=until_idle)
        except Relaned as error:
            log.info("%s: starting again", error)
        else:
            return


def _turn(
    settings: Settings,
    target: str,
    lanes: Lanes,
    make: Callable[[], Participant],
    turn: Turn,
    *,
    until_idle: bool,
) -> None:
    """Drain these lanes until stopped, idle, or there are others."""
    drainers = [
        Drainer(settings, target, lane, make, turn, lanes=lanes.total, until_idle=until_idle) for lane in lanes.ours
    ]
    if len(drainers) == 1:
        drainers[0].run()
        return
    failed: list[BaseException] = []

    def guarded(drainer: Drainer) -> None:
        try:
            drainer.run()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)
            turn.set()

    threads = [threading.Thread(target=guarded, args=(drainer,), name=drainer.name) for drainer in drainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise next((error for error in failed if isinstance(error, Relaned)), failed[0])
