"""The clock: takes the ticks, and keeps house.

One clock at a time, by a lease with an epoch like any lane's. It looks at the log's sequence every few
milliseconds while there is traffic, and less often when there was none for a while; it is the only
one that ever notifies. No tick, no progress: `outbox status` shows the age of the last one.

A second thread keeps house on a connection of its own, so that it never delays a tick: partitions ahead,
old ticks and positions thinned, results and rate limits that have run out removed, staged blobs of ended transactions
swept, old partitions archived and dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import psycopg

from outbox import era, retention, sql, tick
from outbox.database import connect
from outbox.errors import OutboxError
from outbox.failpoint import hit
from outbox.lane import Lane
from outbox.position import Position
from outbox.settings import Settings
from outbox.store import Store, open_store
from outbox.tick import new_nonce
from workers.sweeper import sweep

log = logging.getLogger("outbox.clock")

BUSY = 0.004
"""Seconds between looks while there is traffic: half of it is what a commit waits on average."""

IDLE = 0.01
"""Seconds between looks when nothing was written for `QUIET`."""

QUIET = 30.0
"""Seconds without a tick after which the clock looks less often."""

NONCE_EVERY = 60.0
"""Seconds that ticks share a nonce. The last tick of each nonce is kept up to the horizon: this bounds how many."""

HOUSE_EVERY = 5.0
"""Seconds between rounds of housekeeping."""

RETENTION_EVERY = 600.0
"""Seconds between looks whether a part of the log is old enough to go."""

EXPIRE_PAGE = 1000
"""Rows that are removed at a time because they have run out."""

TICK_AGE = "1 hour"
"""Ticks younger than this are all kept."""

UNIQUE_GROUP = 1000
"""Keys of unique messages that are looked at in one transaction."""

UNIQUE_GROUPS = 20
"""Groups of them in one round."""

TRASH_AGE = 24 * 3600.0
"""Seconds that a deleted blob stays in the trash."""


class Clock:
    """Takes ticks for as long as it owns the lane `clock/0`."""

    def __init__(self, conn: psycopg.Connection[Any], lane: Lane) -> None:
        self.conn = conn
        self.lane = lane
        era.check(conn)
        self._log = era.identity(conn)
        self._nonce = new_nonce()
        self._nonce_at = self._tick_at = time.monotonic()
        self._frontier: int | None = None
        # Each owner begins with a tick of its own nonce, so that histories can be told apart.
        self._last = self._take(tick.poll(conn))

    def _take(self, reading: tick.Reading) -> tick.Tick:
        now = time.monotonic()
        if now - self._nonce_at > NONCE_EVERY:
            self._nonce, self._nonce_at = new_nonce(), now
        self._tick_at, self._frontier = now, None
        return tick.take(self.conn, self.lane.epoch, reading.low, self._nonce)

    def step(self) -> bool:
        """Look, and take a tick if readers would see something new. → whether it did. Raises `Fenced`."""
        self.lane.check(self.conn)
        reading = tick.poll(self.conn)
        if self._frontier is None and reading.low == self._last.high:
            # The sequence stands still. Whoever drew an id so far has an xid below this one.
            self._frontier = tick.frontier(self.conn)
            reading = tick.poll(self.conn)
        if not tick.due(self._last, self._frontier or 0, reading):
            return False
        frontier = self._frontier if reading.low == self._last.high else None
        self._last = self._take(reading)
        self._frontier = frontier if self._last.high == reading.low else None
        return True

    @property
    def position(self) -> Position:
        """The newest tick."""
        return Position(self._log, self._last.id, self._last.nonce)

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return BUSY if time.monotonic() - self._tick_at < QUIET else IDLE


class Housekeeping:
    """A thread that does a round every few seconds until `stop` is set, while this process is the clock.

    Not before: in a copy of the database, whose transactions are not those of the staged files, it would remove what
    the original needs.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings = settings
        self._store: Store | None = None
        self._sweep_at = 0.0
        self._retain_at = 0.0
        self._stop = stop
        #: Set while this process is the clock.
        self.allowed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(timeout=10)

    def _run(self) -> None:
        conn: psycopg.Connection[Any] | None = None
        while not self._stop.wait(HOUSE_EVERY):
            if not self.allowed.is_set():
                continue
            try:
                conn = conn or connect(self._settings.database, name="housekeeping", check=False)
                keep_house(conn, self._blobs())
                self._retain(conn)
            except (psycopg.Error, OSError, OutboxError) as error:
                ours = isinstance(error, OutboxError)
                log.warning("housekeeping put off: %s", error if ours else type(error).__name__)
                if conn is not None:
                    conn.close()
                conn = None
        if conn is not None:
            conn.close()

    def _retain(self, conn: psycopg.Connection[Any]) -> None:
        if time.monotonic() < self._retain_at:
            return
        self._retain_at = time.monotonic() + RETENTION_EVERY
        for gone in retention.keep(conn, self._settings):
            log.info("the partition %s is archived and dropped: the log begins with id %d", gone.name, gone.until)

    def _blobs(self) -> Store | None:
        """The store, when a sweep is due. None where blobs are on another machine."""
        if self._settings.blobs is None or time.monotonic() < self._sweep_at:
            return None
        self._store = self._store or open_store(self._settings)
        self._sweep_at = time.monotonic() + self._store.sweep_every
        return self._store


def keep_house(conn: psycopg.Connection[Any], blobs: Store | None) -> None:
    """One round. Each part is a transaction of its own, and may be killed anywhere."""
    conn.execute("select outbox.add_partitions()")
    hit("house.partitions")
    conn.execute(sql.load("tick_thin"), {"age": TICK_AGE})
    hit("house.ticks")
    conn.execute(sql.load("position_thin"))
    hit("house.positions")
    expire(conn)
    for _ in range(UNIQUE_GROUPS):
        row = conn.execute("select outbox.forget_unique(%s)", (UNIQUE_GROUP,)).fetchone()
        if row is None or row[0] < UNIQUE_GROUP:
            break
    if blobs is not None:
        row = conn.execute("select log from outbox.identity").fetchone()
        if row is not None:
            sweep(conn, blobs, log=row[0], trash_age=TRASH_AGE)


def expire(conn: psycopg.Connection[Any]) -> None:
    """Remove results, and numbers of rate limits, that have run out: page by page, each in a transaction of its own."""
    for statement, first in (("result_expire", "-infinity"), ("tally_expire", ""), ("rate_expire", "")):
        after = first
        while True:
            row = conn.execute(sql.load(statement), {"after": after, "limit": EXPIRE_PAGE}).fetchone()
            hit("house.expired")
            if row is None or row[1] < EXPIRE_PAGE:
                break
            after = row[0]
