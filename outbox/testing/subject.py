"""A subject: what the conformance suite has to know of a participant, told by its author.

The suite makes one subject for each case, with an empty folder of its own, and another one in the process that it
kills. So everything that both must find (files, the address of a server) lies in that folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from outbox.intent import Intent
from outbox.participant import LaneView, Participant


class Broken(AssertionError):
    """The participant doesn't keep its contract; the text says which part of it, and where that is told."""


class Subject(ABC):
    """A participant under test. Subclass it; what has a default needs no other for most."""

    #: The target that the participant is for.
    target = "subject"
    #: Failpoints that it passes while it applies the puts of a batch. The suite kills it at each of them. Your own
    #: are hit by `outbox.failpoint.hit("own.NAME")`.
    failpoints: tuple[str, ...] = ()
    #: Whether a later put of a key takes the place of the earlier one. False: each put is an effect of its own.
    replaces = True
    #: Whether `held` has the effects of a key in the order in which they were made. Counts if nothing is replaced.
    ordered = True
    #: Whether it refuses an owner of a lower epoch. False only where the store can't know epochs, and a late
    #: effect does no harm, or none that could be helped.
    fences = True
    #: Whether `probe` can tell what became of every attempt. False: what it can't tell about is made again.
    certain = True
    #: Whether `inventory` lists what it holds.
    lists = True

    def __init__(self, home: Path) -> None:
        """`home` is an empty folder, or the one that a subject of the same case has filled."""
        self.home = home

    def start(self) -> None:  # noqa: B027 - most have nothing to start
        """Start what the participant talks to. Called once for each case, in the suite's process only."""

    def stop(self) -> None:  # noqa: B027 - nor to stop
        """End what `start` started."""

    @abstractmethod
    def make(self) -> Participant:
        """A new participant, not opened, always on the same store."""

    @abstractmethod
    def put(self, number: int, name: str, version: int) -> Intent:
        """The intent of this number, which makes an effect that can be told from those of other names and versions.

        The intents of one name have one key. Where a key says all about the effect (it is a digest, say), there is
        but one version.
        """

    def undo(self, number: int, put: Intent) -> Intent | None:
        """The intent of this number, which takes the effect of `put` back. Not tested if a subject does not have it."""
        del number, put
        return None

    @abstractmethod
    def effect(self, intent: Intent) -> Any:
        """What `held` shows when this put was applied: any value that compares, such as (key, digest).

        None for an intent that `undo` made.
        """

    def held(self) -> Iterable[Any]:
        """The effects that there are, looked up at the store itself: one that was made twice is there twice.

        By default what `inventory` lists, as (key, digest).
        """
        participant = self.make()
        try:
            return [(item.key, item.digest) for item in participant.inventory()]
        finally:
            participant.close()

    def poison(self, number: int, name: str) -> Intent:
        """The intent of this number, which nothing can apply, with the key of the puts of `name`.

        By default one of an action that there is not.
        """
        return self.put(number, name, 0)._replace(action="no-such-action")

    def away(self) -> AbstractContextManager[None]:
        """Takes the store away as long as it is entered. Not tested if a subject does not have it."""
        return nullcontext()

    def view(self, epoch: int, *, unclean: bool = False) -> LaneView:
        """The lane that the participant is opened for."""
        return LaneView(self.target, 0, epoch, unclean)


def expected(subject: Subject, intents: Iterable[Intent]) -> list[Any]:
    """The effects there are when each of these puts and undos was applied once, in this order."""
    held: list[tuple[str, Any]] = []
    for intent in intents:
        effect = subject.effect(intent)
        if effect is None or subject.replaces:
            held = [(key, other) for key, other in held if key != intent.key]
        if effect is not None:
            held.append((intent.key, effect))
    return [effect for _, effect in held]
