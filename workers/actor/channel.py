"""The channel: where one queue's claimed messages wait for dramatiq's threads.

Filled by the thread of `workers.actor.delivery`, emptied by dramatiq's consumer thread, in order of priority. No I/O.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Collection, Iterable

from outbox.actor.delivered import Delivered

AHEAD_MOST = 2048
"""Messages that are claimed before a thread is free for them, at most. What is claimed when its worker dies is tried
again with care, few at a time."""

AHEAD = 0.05
"""Seconds of work that are claimed before a thread is free for it: longer than a claim takes, which waits for the
disk."""

WORTH = 0.25
"""Share of what is claimed ahead from which on it is worth to claim more."""

COUNT_OVER = 0.01
"""Seconds over which it is counted how fast the threads are, at least."""

BUSY_AFTER = 2.0
"""Seconds without an acknowledgement, with all hands full, after which a consumer counts as busy."""


class Channel:
    """One queue in this process."""

    def __init__(self, queue: str, target: str) -> None:
        self.queue = queue
        self.target = target
        self._ready: list[tuple[int, int, Delivered]] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        #: How many wait for a change.
        self._waiting = 0
        self._prefetch = 1
        #: Messages that dramatiq has and has not given back.
        self._out = 0
        self._open = True
        #: Messages given back since `_counted`, and how many it were per second before that.
        self._finished = 0
        self._rate = 0.0
        self._counted = self._moved = time.monotonic()

    def begin(self, prefetch: int) -> None:
        """A consumer takes messages, up to so many at a time."""
        with self._lock:
            self._prefetch, self._open = max(1, prefetch), True
            self._moved = time.monotonic()

    def put(self, messages: Iterable[Delivered]) -> None:
        """Messages that are claimed, durably, or given back unbegun."""
        with self._lock:
            for message in messages:
                heapq.heappush(self._ready, (message.priority, message.id, message))
            if self._waiting:
                self._changed.notify_all()

    def get(self, timeout: float) -> Delivered | None:
        """The most urgent message; None after `timeout` seconds without one, or without a free hand."""
        now = time.monotonic()
        deadline = now + timeout
        with self._lock:
            while not (self._open and self._ready and self._out < self._prefetch and self._ready[0][2].mine()):
                self._waiting += 1
                self._changed.wait(deadline - now)
                self._waiting -= 1
                now = time.monotonic()
                if now >= deadline:
                    return None
            self._out += 1
            self._moved = now
            return heapq.heappop(self._ready)[2]

    def finished(self) -> None:
        """Dramatiq has given one back."""
        with self._lock:
            self._out -= 1
            self._finished += 1
            if self._waiting:
                self._changed.notify_all()

    def withdraw(self, lane: int | None = None) -> list[Delivered]:
        """Take those back that nobody has begun: what came straight from one lane, or all."""
        with self._lock:
            gone: list[tuple[int, int, Delivered]] = []
            stay: list[tuple[int, int, Delivered]] = []
            for entry in self._ready:
                hold = entry[2].hold
                (gone if lane is None or (hold.holder is None and hold.lane == lane) else stay).append(entry)
            self._ready = stay
            heapq.heapify(stay)
        return [entry[2] for entry in gone]

    def drop(self, ids: Collection[int]) -> list[Delivered]:
        """Take those back of these that nobody has begun."""
        with self._lock:
            gone = [entry for entry in self._ready if entry[2].id in ids]
            self._ready = [entry for entry in self._ready if entry[2].id not in ids]
            heapq.heapify(self._ready)
        return [entry[2] for entry in gone]

    def shut(self) -> None:
        """Give nothing out any more, until `begin`."""
        with self._lock:
            self._open = False

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def out(self) -> int:
        """How many dramatiq has."""
        return self._out

    def appetite(self) -> int:
        """How many more to claim: what the threads can take, and what they do in `AHEAD` seconds.

        None as long as it would be few: a claim is some round trips and a write, and has to be worth it.
        """
        with self._lock:
            self._count()
            ahead = max(self._prefetch, min(AHEAD_MOST, round(self._rate * AHEAD)))
            more = self._prefetch + ahead - self._out - len(self._ready) if self._open else 0
            return more if more >= ahead * WORTH else 0

    def _count(self) -> None:
        now = time.monotonic()
        if self._finished:
            self._moved = now
        if (took := now - self._counted) >= COUNT_OVER:
            # They may have been as fast as we were: what is faster counts at once.
            rate = self._finished / took
            self._rate = max(rate, (rate + self._rate) / 2)
            self._finished, self._counted = 0, now

    def busy(self) -> bool:
        """Whether all hands have been full for a while."""
        with self._lock:
            return self._out >= self._prefetch and time.monotonic() - self._moved > BUSY_AFTER

    def __len__(self) -> int:
        """Messages that are here or with dramatiq."""
        return self._out + len(self._ready)
