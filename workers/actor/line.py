"""The line: messages of one key that wait for their turn, and those whose turn it is (`outbox.actor.turn`).

A message that finds the way free is claimed like any other. One that has to wait is parked as `blocked`, so that no
number of them takes memory or holds up the other keys of its lane. Who records that one is done gives the next one
its turn, in the same transaction; it is taken in hand as a retry that is due. What has happened meanwhile without
anybody's record (an operator's decision, a recall) is found by a look around.

`Line` is what a lane's owner has in memory: which keys are in its hands. It is empty when a lane is claimed, because
what was in the hands of the owner before is parked then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from outbox import sql
from outbox.actor.turn import Turn, turn_in
from outbox.database import Connection
from outbox.intent import Intent

AROUND = 1000
"""Keys of a queue that a look around passes."""


class Before(NamedTuple):
    """Who of a key is parked before a message that was just read."""

    #: Somebody who comes before it in order.
    held: bool
    #: Somebody who waits as well.
    waits: bool
    #: How many are in somebody's hands.
    running: int


_NOBODY = Before(held=False, waits=False, running=0)


class Line:
    """The keys of one lane that are in its owner's hands. Used by the delivery's thread alone."""

    def __init__(self) -> None:
        #: Ids in `open` that have a key, until it is written that they are done.
        self._busy: dict[str, set[int]] = {}
        self._done: list[tuple[str, int]] = []
        #: Keys of which messages are to be parked behind others with the next write.
        self._joined: set[str] = set()
        self._before: dict[str, Before] = {}

    def look(self, conn: Connection, target: str, page: Sequence[Intent]) -> None:
        """Find out who is before the messages of a page."""
        keys = {turn.key for intent in page if (turn := turn_in(intent)) is not None}
        rows = conn.execute(sql.load("actor_line"), {"target": target, "keys": list(keys)}) if keys else ()
        self._before = {key: Before(*rest) for key, *rest in rows}

    def admit(self, turn: Turn, number: int) -> bool:
        """Whether a message may be claimed; if not, it is to be parked as blocked. In the order of the log."""
        before, busy = self._before.get(turn.key, _NOBODY), self._busy.get(turn.key, ())
        if turn.limit:
            free = not before.waits and len(busy) + before.running < turn.limit
        else:
            free = not before.held and not busy
        if free and turn.key not in self._joined:
            self._busy.setdefault(turn.key, set()).add(number)
            return True
        self._joined.add(turn.key)
        return False

    def done(self, turn: Turn, number: int) -> None:
        """A claimed message was given back. Its place is free once that is written."""
        self._done.append((turn.key, number))

    @property
    def changed(self) -> bool:
        """Whether somebody may have his turn with the next write."""
        return bool(self._done or self._joined)

    def next(self) -> dict[str, int]:
        """Keys of which somebody may have his turn → how many are still in hand."""
        gone = set(self._done)
        keys = {key for key, _ in self._done} | self._joined
        return {key: sum((key, number) not in gone for number in self._busy.get(key, ())) for key in keys}

    def wrote(self) -> None:
        """What was taken down is durable."""
        for key, number in self._done:
            busy = self._busy.get(key, set())
            busy.discard(number)
            if not busy:
                self._busy.pop(key, None)
        self._done, self._joined = [], set()

    def busy(self, key: str) -> int:
        """How many of a key are in hand."""
        return len(self._busy.get(key, ()))

    @property
    def counts(self) -> dict[str, int]:
        """Keys → how many are in hand."""
        return {key: len(numbers) for key, numbers in self._busy.items()}


def turn(conn: Connection, keys: Mapping[tuple[str, str], int]) -> int:
    """Give the next ones of these keys their turn; the values are how many are in hand. → how many have it now."""
    if not keys:
        return 0
    return conn.execute(
        sql.load("actor_turn"),
        {"targets": [t for t, _ in keys], "keys": [k for _, k in keys], "busy": list(keys.values())},
    ).rowcount


def around(conn: Connection, target: str, lanes: Iterable[tuple[tuple[int, int], Line]], after: str) -> tuple[int, str]:
    """Look for messages of some lanes that wait behind nothing: at `AROUND` keys, from `after` on.

    `lanes`: their slots, first and last, and their lines. → how many have their turn now, and where to go on.
    """
    slots, lines = zip(*lanes, strict=True)
    rows = conn.execute(
        sql.load("actor_waiting"),
        {
            "target": target,
            "after": after,
            "limit": AROUND,
            "low": [low for low, _ in slots],
            "high": [high for _, high in slots],
        },
    ).fetchall()
    keys = {(target, key): sum(line.busy(key) for line in lines) for key, ours in rows if key is not None and ours}
    last = rows[-1][0] if rows else None
    return turn(conn, keys), last or ""


def recall(conn: Connection, targets: Sequence[str]) -> int:
    """Give those their turn whose sagas don't want them any more. → how many."""
    return conn.execute(sql.load("actor_recalled"), {"targets": list(targets)}).rowcount
