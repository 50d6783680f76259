"""The pace of a scrub: how fast it may go, and what is done regularly while it goes.

A scrub reads everything, and what it reads with is what the application reads with. `Pace` counts what was looked at,
holds it to a rate, and calls back about once a second, so that the lease of the operation is kept and a person sees
it move, also in the middle of a blob of a gigabyte.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

BEAT = 1.0
"""Seconds between two calls back."""

NAP = 0.5
"""Seconds slept in one go, at most: whoever is asked to stop does so within them."""


class Rate(NamedTuple):
    """So many a second."""

    amount: float
    unit: Literal["items", "bytes"]


@dataclass(slots=True)
class Pace:
    """What was done, and how fast it may go on."""

    rate: Rate | None = None
    #: Called about every `BEAT` seconds.
    beat: Callable[[], None] = lambda: None
    items: int = 0
    bytes: int = 0
    _begun: float = field(default_factory=time.monotonic)
    _first: tuple[int, int] = (0, 0)
    _beaten: float = 0.0

    def resume(self, items: int, read: int) -> None:
        """Count on from where an earlier process was; its time is not ours."""
        self.items, self.bytes = items, read
        self._first, self._begun = (items, read), time.monotonic()

    def spend(self, items: int = 0, read: int = 0) -> None:
        """Count, wait if that was too fast, call back if it is time."""
        self.items += items
        self.bytes += read
        while True:
            now = time.monotonic()
            if now - self._beaten >= BEAT:
                self._beaten = now
                self.beat()
            wait = self._begun + self._needed() - now
            if wait <= 0:
                return
            time.sleep(min(wait, NAP))

    def _needed(self) -> float:
        """Seconds that what was done should have taken."""
        if self.rate is None:
            return 0.0
        done = self.items - self._first[0] if self.rate.unit == "items" else self.bytes - self._first[1]
        return done / self.rate.amount
