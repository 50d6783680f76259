"""The guard: what keeps a repetition from overwriting something newer (`outbox.repetition`).

Called by the reader. It costs a batch without repetitions nothing but a look at its headers. A batch that has some ends
before one that follows an intent of its own key: what became of that one is then recorded, and the database can
tell whether it is newer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import psycopg

from outbox.intent import Intent
from outbox.lane import Lane
from outbox.repetition import Repeats, overtaken
from outbox.tick import Tick

_HEADERS = attrgetter("headers")


def apart(batches: Iterable[tuple[Sequence[Intent], bool]]) -> Iterator[tuple[Sequence[Intent], bool]]:
    """The batches of a page, cut before each repetition of which another intent of the key stands before it."""
    for batch, last in batches:
        start, keys = 0, set[str]()
        if any(map(_HEADERS, batch)):
            for place, intent in enumerate(batch):
                if Repeats.read(intent) is None:
                    keys.add(intent.key)
                elif intent.key in keys:
                    yield batch[start:place], False
                    start, keys = place, set()
        yield batch[start:], last


class Guard:
    """Looks for what has overtaken the repetitions of one owner of a lane."""

    def __init__(self, conn: psycopg.Connection[Any], lane: Lane) -> None:
        self._conn = conn
        self._lane = lane

    def overtaken(self, batch: Sequence[Intent], start: Tick, end: Tick) -> set[int]:
        """Those of `batch` that are not to be applied, because something newer of their key was."""
        if not any(map(_HEADERS, batch)):
            return set()
        found = [(intent, says) for intent in batch if (says := Repeats.read(intent)) is not None]
        if not found:
            return set()
        return overtaken(self._conn, self._lane.target, self._lane.slots, found, start=start, end=end)
