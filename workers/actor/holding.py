"""A holding: a lane of a queue that this process owns, and how far it is there.

`position` and `open` are what is in memory; they are durable once `workers.actor.ledger` has written them down, and
nothing that was read is handed out before that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from outbox import era, log, sql, tick
from outbox.actor.results import Result
from outbox.database import Connection
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.lane import Lane, now
from outbox.parked import Parking
from outbox.position import Position
from outbox.saga.report import Report
from outbox.watermark import Watermark
from workers.actor.channel import Channel
from workers.actor.line import Line

EMPTY_EVERY = 0.2
"""Seconds between writes of a position that passed nothing of this lane: ticks come far more often."""

STRIDE_MOST = 2000
"""Intents of a page that is read past those who wait for their turn."""


class Holding:
    """One lane, from its claim until it is lost or released. Used by the delivery's thread alone."""

    def __init__(self, lane: Lane, channel: Channel, state: Path | None = None) -> None:
        """`state` is the state directory of this machine: see `outbox.watermark`."""
        self.lane = lane
        self._watermark = Watermark(state, str(lane))
        self.channel = channel
        #: Claimed, and not done yet.
        self.open: set[int] = set()
        self.line = Line()
        #: To be written with the position.
        self.parkings: list[Parking] = []
        self.reports: list[Report] = []
        self.forget: list[int] = []
        self.results: dict[int, Result] = {}
        #: Whether something must be written soon.
        self.dirty = False
        #: Set when another owner has it, or nobody: its messages are not ours any more.
        self.lost = False
        self.position: Position
        self._start: tick.Tick
        self._end: tick.Tick | None = None
        #: Whether the page that was read last is the end of its batch.
        self._ends = False
        self._stride = 0
        self._written: Position
        self._written_at = 0.0

    def begin(self, conn: Connection) -> None:
        """Find out where to go on, and park what the owner before left open: durable when it returns.

        Raises `NotThisLog` when the log can't go on here.
        """
        self._watermark.check(conn, era.check(conn))
        lane = self.lane
        me = {"target": lane.target, "lane": lane.lane}
        with conn.transaction():
            lane.fence(conn)
            self.position = self._written = lane.stand(conn)
            left = conn.execute(sql.load("actor_open"), me).fetchall()
            if left:
                todo = [number for number, done in left if not done]
                conn.execute(sql.load("actor_adopt"), {"ids": todo, "deaths": 1 if lane.unclean else 0})
                conn.execute(sql.load("actor_forget"), {"ids": [number for number, done in left if done]})
                lane.advance(conn, self.position)
        hit("actor.adopted")
        self._start = tick.get(conn, self.position.tick)

    def mine(self) -> bool:
        """Whether its messages may be begun: the lease is known to hold. Asked by any thread, so without a query."""
        return not self.lost and now() < self.lane.deadline

    def read(self, conn: Connection, newest: tick.Tick, limit: int) -> list[Intent]:
        """The next intents: `limit`, or more where many have to wait. None if there are none up to tick `newest`; else
        `passed` goes on behind them."""
        position = self.position
        if not position.upto:
            self._end = tick.reach(conn, self._start, newest)
        elif self._end is None or self._end.id != position.upto:
            self._end = tick.get(conn, position.upto)
        end = self._end
        if end.id == position.tick:
            return []
        if tick.same_place(self._start, end):
            # The end of an era is the beginning of the next one.
            self.position, self._start = log.step(position, end, None), end
            return self.read(conn, newest, limit)
        limit = max(limit, self._stride)
        page = log.page(
            conn, self._start, end, target=self.lane.target, slots=self.lane.slots, after=position.after, limit=limit
        )
        self._ends = len(page) < limit
        if not page:
            self._step(end, None)
        return page

    def stands_before(self, newest: tick.Tick) -> tick.Tick | None:
        """The tick that it stands at, if all of the batch from there to `newest` is still to be read."""
        start = self._start
        between = self.position.upto == 0 and start.id < newest.id
        return start if between and start.first == newest.first and not start.shows_nothing else None

    def shown(self, newest: tick.Tick, page: Sequence[Intent]) -> None:
        """`page` is all that there is up to `newest`: as if it had been read."""
        self._end, self._ends = newest, True
        if not page:
            self._step(newest, None)

    def passed(self, page: Sequence[Intent], count: int, claimed: int) -> None:
        """So many of a page are claimed or parked, or there is nothing to do about them."""
        assert self._end is not None  # noqa: S101 - it was read
        self._step(self._end, None if self._ends and count == len(page) else page[count - 1].id)
        self.dirty = True
        # Where few can be claimed, because the others wait for their turn, the next page is longer.
        self._stride = min(STRIDE_MOST, 2 * count) if 2 * claimed < count else 0

    def _step(self, end: tick.Tick, after: int | None) -> None:
        self.position = log.step(self.position, end, after)
        if after is None:
            self._start = end

    def done(self, number: int) -> None:
        """A message is not open any more."""
        self.open.discard(number)
        self.dirty = True

    @property
    def to_write(self) -> bool:
        """Whether its position is to be written now."""
        return self.dirty or (self.position != self._written and time.monotonic() - self._written_at > EMPTY_EVERY)

    def wrote(self) -> None:
        """Everything in memory is durable."""
        self._written, self._written_at, self.dirty = self.position, time.monotonic(), False
        self.parkings, self.reports, self.forget, self.results = [], [], [], {}
        self.line.wrote()
        self._watermark.note(self.position)
