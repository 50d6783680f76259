"""Parked intents: set aside with their reason, so that a failing intent never stops its lane.

The worker's side: everything here happens in the owner's transaction, under the lane's fence, and is durable with
it. What operators do with the same intents is in `outbox.decision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import psycopg

from outbox import sql
from outbox.intent import Intent
from outbox.lane import Lane
from outbox.tick import Tick

Reason = Literal["retry", "poison", "in_doubt", "blocked", "due", "skipped", "running"]


class Parking(NamedTuple):
    """An intent to be set aside."""

    id: int
    #: retry: at a time; poison: an operator decides; in_doubt: the effect may have happened; blocked: behind
    #: another intent of its key; due: its time has not come. (skipped: by an operator, never by a worker;
    #: running: a message of an actor that is in hand, and has a row of its own.)
    reason: Reason
    attempts: int = 0
    #: Seconds until the next try, for `retry`.
    wait: float = 0.0
    error: str = ""
    #: A try that failed may have had its effect all the same. Once it may have, that stays so.
    doubtful: bool = False


ERROR_LIMIT = 500
"""Characters of an error that are kept."""

LIMIT = 100
"""Parked intents tried in one go."""


def put(conn: psycopg.Connection[Any], parkings: Sequence[Parking]) -> None:
    """Set intents aside. One that is parked already keeps its place in its key's queue."""
    conn.execute(
        sql.load("parked_put"),
        {
            "id": [p.id for p in parkings],
            "reason": [p.reason for p in parkings],
            "attempts": [p.attempts for p in parkings],
            "wait": [p.wait for p in parkings],
            "error": [p.error[:ERROR_LIMIT] for p in parkings],
            "doubtful": [p.doubtful for p in parkings],
        },
    )


class Heads(dict[str, int]):
    """key → the first of its intents that is parked and holds it: what comes behind queues up.

    What comes before it does not. A reader meets that when its participant has lost everything.
    """

    def add(self, intent: Intent) -> None:
        """It is parked, and holds its key."""
        self[intent.key] = min(intent.id, self.get(intent.key, intent.id))

    def hold(self, intent: Intent) -> bool:
        """Whether it has to queue up, or is parked itself."""
        head = self.get(intent.key)
        return head is not None and head <= intent.id

    def replace(self, heads: Mapping[str, int | None]) -> None:
        """Those of some keys are others now, or there is none."""
        for key, head in heads.items():
            if head is None:
                self.pop(key, None)
            else:
                self[key] = head


class Taken(NamedTuple):
    """How often a parked intent was tried, this time included, and what came of it."""

    attempts: int
    #: … in a row without an outcome.
    deaths: int
    #: Whether one of those that failed may have had its effect all the same.
    doubtful: bool


def take(
    conn: psycopg.Connection[Any], lane: Lane, place: tuple[Tick, Tick, int], *, limit: int, wait: float
) -> dict[int, Taken]:
    """The intents whose time has come; one that killed its worker comes alone, when no other is due.

    Only such that the lane has passed: what is still before it, because it reads again, would be met there once more.
    Its `place`: it has read all that the first tick shows, and of the batch to the second one what is not after an id.
    They are due again after `wait` seconds, unless `put` or `remove` says otherwise before.
    """
    ready = conn.execute(sql.load("parked_ready"), _share(lane)).fetchone()
    if ready is None or not any(ready):
        return {}
    plain, _deadly = ready
    start, end, after = place
    rows = conn.execute(
        sql.load("parked_take"),
        {
            "target": lane.target,
            "lane": lane.lane,
            "epoch": lane.epoch,
            "deadly": not plain,
            "limit": min(limit, LIMIT) if plain else 1,
            "wait": wait,
            "first": start.first,
            "high": start.high,
            "start": start.snapshot,
            "after": after,
            "end_first": end.first,
            "end_high": end.high,
            "end": end.snapshot,
        },
    )
    return {row[0]: Taken(*row[1:]) for row in rows}


def untried(intents: Sequence[Intent], taken: Mapping[int, Taken]) -> list[Parking]:
    """What gives the attempts back that were not made after all."""
    return [Parking(i.id, "retry", taken[i.id].attempts - 1, 0.0, "waiting for the participant") for i in intents]


def promote(conn: psycopg.Connection[Any], lane: Lane) -> None:
    """Give those their turn that are blocked behind nothing any more."""
    conn.execute(sql.load("parked_promote"), _share(lane))


def _share(lane: Lane) -> dict[str, Any]:
    return {"target": lane.target, "slot_low": lane.slots.low, "slot_high": lane.slots.high}


def remove(conn: psycopg.Connection[Any], ids: Sequence[int]) -> dict[str, int | None]:
    """Take intents out. → for each of their keys: what holds it now, if others are still parked."""
    return {row[0]: row[1] for row in conn.execute(sql.load("parked_remove"), {"ids": list(ids)})}


def waiting(conn: psycopg.Connection[Any], lane: Lane) -> bool:
    """Whether something is parked that will be tried again without anybody's doing, and not on a later day."""
    return conn.execute(sql.load("parked_waiting"), _share(lane)).fetchone() is not None


def skipped(conn: psycopg.Connection[Any], lane: Lane) -> set[int]:
    """The intents that operators have skipped. Look at them after `heads`, never before: a skip between the two then
    shows up here, or its key is still one that others queue behind."""
    return {row[0] for row in conn.execute(sql.load("parked_skipped"), _share(lane))}


def heads(conn: psycopg.Connection[Any], lane: Lane) -> Heads:
    """The keys of which something is parked that later intents must queue behind."""
    return Heads(conn.execute(sql.load("parked_heads"), _share(lane)).fetchall())


def which(conn: psycopg.Connection[Any], ids: Sequence[int]) -> set[int]:
    """Those of `ids` that are parked."""
    return {row[0] for row in conn.execute("select id from outbox.parked where id = any(%s)", (list(ids),))}
