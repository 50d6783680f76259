"""Retries: messages that are parked until their time comes, taken in hand again.

Also those that were in hand when their worker died. Each of them may have killed it: after one death they are tried a
few at a time, among others; after two, alone (`workers.actor.quarantine`). Who is alone then is given up
(`workers.actor.ending`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from outbox import sql
from outbox.database import Connection
from outbox.failpoint import hit
from outbox.intent import Intent
from workers.actor.holding import Holding

EVERY = 0.1
"""Seconds between looks at what is due."""

DEATHS = 3
"""A message that was in hand so often when its worker died is given up, if it was alone the last time."""

DEATHS_MOST = 10
"""… and in any case after so many: where something long runs, nothing is ever alone."""

SUSPECTS = 4
"""Messages that were in hand once when their worker died are tried so many at a time."""


class Taken(NamedTuple):
    """A parked message that is in our hands now."""

    intent: Intent
    #: How often it was tried, this time included.
    attempts: int
    #: How often in a row without an outcome, this time included.
    deaths: int
    #: What an earlier try has left.
    options: dict[str, Any] | None


class Due(NamedTuple):
    """What is due of one queue, in our lanes."""

    target: str
    #: Whether there are messages that were never in hand when a worker died, or were once, or oftener.
    plain: bool
    once: bool
    often: bool
    #: Whether there are some to be given up, and some that were skipped (`workers.actor.ending`).
    hopeless: bool
    untold: bool


def ready(conn: Connection, holdings: Sequence[Holding]) -> list[Due]:
    """The queues of which something is due."""
    rows = conn.execute(sql.load("actor_ready"), {**lanes_of(holdings), "most": DEATHS_MOST, "alone": DEATHS})
    return [Due(*row) for row in rows]


class Look(NamedTuple):
    """What came of a look at what is due."""

    taken: list[Taken]
    #: Whether there may be more: some were found that have to wait for their turn.
    more: bool


def take(
    conn: Connection,
    holder: UUID,
    holdings: Sequence[Holding],
    *,
    limit: int,
    deaths: tuple[int, int] = (0, 0),
    alone: bool = False,
) -> Look:
    """Those of one queue whose time has come, of our lanes: durably ours when this returns. `deaths`: the least and the
    most that they have had. `alone`: nothing else is in hand."""
    if limit <= 0:
        return Look([], more=False)
    busy = {key: count for holding in holdings for key, count in holding.line.counts.items()}
    rows = conn.execute(
        sql.load("actor_take"),
        {
            **lanes_of(holdings),
            "target": holdings[0].lane.target,
            "holder": holder,
            "least": deaths[0],
            "most": deaths[1],
            "limit": limit,
            "alone": alone,
            "busy": list(busy),
            "counts": list(busy.values()),
        },
    ).fetchall()
    if rows:
        hit("actor.taken")
    return Look([Taken(Intent._make(row[:8]), *row[8:]) for row in rows if row[8] is not None], more=bool(rows))


def orphans(conn: Connection, holdings: Sequence[Holding]) -> None:
    """What is in the hands of a consumer that is gone is due at once, in our lanes."""
    conn.execute(sql.load("actor_orphans"), lanes_of(holdings))


def accompany(conn: Connection, holder: UUID, number: int) -> None:
    """A message is alone no longer."""
    conn.execute(sql.load("actor_accompany"), {"id": number, "holder": holder})


def recover(conn: Connection, holder: UUID, targets: Sequence[str], known: Collection[int]) -> set[int]:
    """Give back what is in our hands as the database has it, and not as we know it. → the rest."""
    rows = conn.execute(sql.load("actor_recover"), {"targets": list(targets), "holder": holder, "known": list(known)})
    return {row[0] for row in rows}


def lanes_of(holdings: Sequence[Holding]) -> dict[str, Any]:
    return {
        "targets": [h.lane.target for h in holdings],
        "lanes": [h.lane.lane for h in holdings],
        "epochs": [h.lane.epoch for h in holdings],
    }
