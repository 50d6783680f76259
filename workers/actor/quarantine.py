"""The quarantine: a message that was in hand twice when its worker died is tried with nothing else in hand.

So only one that is the cause can be given up for it, whatever else kills workers meanwhile. The process reads no more,
until it has nothing left in hand, for a while; then it takes the one, and nothing more as long as that runs, for a
while. Neither holds a process up for longer: where something long is running, the suspect is tried among others, and
where the suspect itself runs for long, the others go on. Used by the delivery's thread alone. No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from outbox.actor.delivered import Delivered

QUIET_WITHIN = 5.0
"""Seconds that a process reads nothing more, so that nothing is left in its hands."""

QUIET_AGAIN = 60.0
"""Seconds until it tries that again, when something has run for longer."""

ALONE_MOST = 60.0
"""Seconds that a suspect is alone at most."""


class Step(Enum):
    """What is to be done now."""

    #: Nothing: everything goes on.
    OPEN = "open"
    #: Take nothing in hand.
    WAIT = "wait"
    #: Take one suspect in hand, and nothing else.
    ALONE = "alone"
    #: Take one suspect in hand, among the others.
    AMONG = "among"
    #: Note that the suspect isn't alone any more; then everything goes on.
    JOIN = "join"


class Quarantine:
    """One process's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.message: Delivered | None = None
        self._since: float | None = None
        self._not_before = float("-inf")

    @property
    def closed(self) -> bool:
        """Whether nothing is to be taken in hand."""
        return self.message is not None or self._since is not None

    def begin(self, message: Delivered) -> None:
        """It is in hand, and nothing else."""
        self.message, self._since = message, self._clock()

    def end(self) -> None:
        """It isn't alone any more, or isn't in hand."""
        self.message = self._since = None

    def step(self, *, wanted: bool, in_hand: int, suspects: int) -> Step:
        """`wanted`: whether one is to be tried. `in_hand`: how many messages are, and how many of them `suspects`."""
        now = self._clock()
        if self.message is not None:
            if in_hand and self._since is not None:
                return Step.JOIN if now - self._since > ALONE_MOST else Step.WAIT
            self.end()
        if not wanted:
            self.end()
            return Step.OPEN
        if not in_hand:
            return Step.ALONE
        if now < self._not_before:
            return Step.OPEN if suspects else Step.AMONG
        if self._since is None:
            self._since = now
        if now - self._since < QUIET_WITHIN:
            return Step.WAIT
        self.end()
        self._not_before = now + QUIET_AGAIN
        return Step.OPEN
