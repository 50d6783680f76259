"""The horizon: where the log begins, because what lay before was dropped.

Retention moves it (`outbox.retention`); log matching asks it (`outbox.tick.match`). A participant whose own position is
before the horizon, such as a copy that is older than the log goes back, would miss what was dropped: it is refused. One
that holds nothing begins at the first tick, and is given the base before the log.

Errors: `NotThisLog` for a position that can't go on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import NotThisLog
from outbox.position import Position


class Horizon(NamedTuple):
    """Where the log begins."""

    #: The first id that is still in the log.
    id: int
    #: The earliest tick that shows everything below it.
    tick: int
    #: The newest tick when the horizon moved last.
    moved: int
    #: The first tick of all, where a participant begins that holds nothing.
    first: int


def read(conn: psycopg.Connection[Any]) -> Horizon:
    """The horizon now."""
    row = conn.execute(sql.load("horizon_read")).fetchone()
    assert row is not None  # noqa: S101 - the migration made the row
    return Horizon(*row)


def hold(conn: psycopg.Connection[Any]) -> None:
    """Keep the horizon where it is until the caller's transaction ends: for whoever writes down that it stands further
    back than is known. Waits for a drop that is under way, which takes a moment."""
    conn.execute(sql.load("horizon_hold"))


def check(conn: psycopg.Connection[Any], position: Position, remedy: str) -> None:
    """Raise `NotThisLog` for a position of this log that can't go on in it: a part that it needs was dropped."""
    horizon = read(conn)
    if position.tick >= horizon.tick:
        return
    # From nothing, in the order of ids: past the base already, or in a base that is still what it was.
    if position.tick == horizon.first and (
        not position.upto or position.after >= horizon.id - 1 or position.upto >= horizon.moved
    ):
        return
    raise NotThisLog(
        f"position {position} is older than this log goes back: it begins at tick {horizon.tick}, and what lay before "
        f"was dropped by retention. Nothing was skipped. Rebuild the participant (outbox resilver), or {remedy}"
    )
