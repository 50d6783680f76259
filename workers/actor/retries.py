"""Retries: messages that are parked until their time comes, taken in hand again.

Also those that were in hand when their worker died. Each of them may have killed it: they are tried a few at a time,
then one at a time, and given up after three deaths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from outbox import parked, sql
from outbox.database import Connection
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.saga import report
from outbox.saga.report import Report
from workers.actor.holding import Holding

EVERY = 0.1
"""Seconds between looks at what is due."""

DEATHS = 3
"""A message that was in hand so often when its worker died is parked."""

SUSPECTS = 4
"""Messages that were in hand once when their worker died are tried so many at a time; after two deaths, one."""

_DEADLY = f"was in hand {DEATHS} times when its worker died"


class Taken(NamedTuple):
    """A parked message that is in our hands now."""

    intent: Intent
    #: How often it was tried, this time included.
    attempts: int
    #: How often in a row without an outcome, this time included.
    deaths: int
    #: What an earlier try has left.
    options: dict[str, Any] | None


def ready(conn: Connection, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Queues of which something is due → the least and the greatest number of deaths of it."""
    rows = conn.execute(sql.load("actor_ready"), {"targets": list(targets)})
    return {target: (least, most) for target, least, most in rows}


class Look(NamedTuple):
    """What came of a look at what is due."""

    taken: list[Taken]
    #: Whether there may be more: some were found that have to wait for their turn.
    more: bool


def take(
    conn: Connection, holder: UUID, holdings: Sequence[Holding], *, limit: int, suspects: int, deaths: tuple[int, int]
) -> Look:
    """Those of one queue whose time has come, of our lanes: durably ours when this returns. `suspects`: how many are in
    hand already that were there when a worker died."""
    least, most = deaths
    if most >= DEATHS:
        _give_up(conn, holdings)
    look = _take(conn, holder, holdings, (0, 0), limit) if least == 0 else Look([], more=False)
    limit -= len(look.taken)
    # However many others are due: a suspect may be the first of its key.
    if most > 0 and suspects < SUSPECTS:
        look = _both(look, _take(conn, holder, holdings, (1, 1), min(limit, SUSPECTS - suspects)))
    if most > 1 and not suspects and not any(one.deaths > 1 for one in look.taken):
        # One after two deaths is tried when no other suspect is.
        look = _both(look, _take(conn, holder, holdings, (2, DEATHS - 1), min(limit, 1)))
    return look


def _take(conn: Connection, holder: UUID, holdings: Sequence[Holding], bounds: tuple[int, int], limit: int) -> Look:
    if limit <= 0:
        return Look([], more=False)
    busy = {key: count for holding in holdings for key, count in holding.line.counts.items()}
    rows = conn.execute(
        sql.load("actor_take"),
        {
            **_lanes(holdings),
            "target": holdings[0].lane.target,
            "holder": holder,
            "least": bounds[0],
            "most": bounds[1],
            "limit": limit,
            "busy": list(busy),
            "counts": list(busy.values()),
        },
    ).fetchall()
    if rows:
        hit("actor.taken")
    return Look([Taken(Intent._make(row[:8]), *row[8:]) for row in rows if row[8] is not None], more=bool(rows))


def _both(one: Look, other: Look) -> Look:
    return Look(one.taken + other.taken, one.more or other.more)


def orphans(conn: Connection, holdings: Sequence[Holding]) -> None:
    """What is in the hands of a consumer that is gone is due at once, in our lanes."""
    conn.execute(sql.load("actor_orphans"), _lanes(holdings))


def _give_up(conn: Connection, holdings: Sequence[Holding]) -> None:
    with conn.transaction():
        rows = conn.execute(
            sql.load("actor_deadly"), {**_lanes(holdings), "deaths": DEATHS, "error": _DEADLY}
        ).fetchall()
        # Nobody knows whether they got through: their sagas see to it.
        steps = [number for number, of_saga in rows if of_saga]
        if steps:
            parked.remove(conn, steps)
            report.send_of_actors(conn, [Report(number, "unknown", _DEADLY) for number in steps])


def _lanes(holdings: Sequence[Holding]) -> dict[str, Any]:
    return {
        "targets": [h.lane.target for h in holdings],
        "lanes": [h.lane.lane for h in holdings],
        "epochs": [h.lane.epoch for h in holdings],
    }
