"""A follower: somebody else who reads the log (another site, a resilver, a long replay), and whom retention waits for.

A follower says which tick it stands at: it needs everything that this tick doesn't show, and, if it reads what was live
at a tick (`outbox.live`), that tick. Nothing it needs is dropped until it moves on or is removed. It never expires by
itself: one that was forgotten holds the log back, and `outbox status` says so.

Everything here is durable when it returns, or with the caller's transaction.

Errors: `NotReady` for a tick that the log doesn't have any more, or a follower that isn't there.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from outbox import horizon, sql
from outbox.errors import NotReady

STALE = 24 * 3600.0
"""Seconds without a word after which `outbox status` warns about a follower."""


class Follower(NamedTuple):
    """Who follows, and where it stands."""

    name: str
    tick: int
    note: str
    since: datetime
    seen_at: datetime
    #: Seconds since it was seen.
    seen_seconds: float


def register(conn: psycopg.Connection[Any], name: str, tick: int, *, note: str = "") -> None:
    """Hold the log from `tick` on for `name`: letters, digits, `_.:/-`, at most 100. Again moves it there.

    The first tick stands for "holds nothing yet": base and log stay as they are. Raises `NotReady` when the tick is
    before the horizon.
    """
    with conn.transaction():
        horizon.hold(conn)
        found = horizon.read(conn)
        if found.first < tick < found.tick:
            raise NotReady(
                f"the log goes back to tick {found.tick} only, and tick {tick} was asked for: begin at the first tick "
                f"({found.first}), with the base"
            )
        conn.execute(sql.load("follower_put"), {"name": name, "tick": tick, "note": note})


def move(conn: psycopg.Connection[Any], name: str, tick: int) -> None:
    """It has passed `tick`, or is still there: call it now and then, so that it is seen. Never moves back.

    Raises `NotReady` when it is not registered (any more): what it needs may be gone, so it must begin anew.
    """
    if conn.execute(sql.load("follower_move"), {"name": name, "tick": tick}).fetchone() is None:
        raise NotReady(f"the follower {name} was removed, and what it needs may be dropped: begin anew")


def remove(conn: psycopg.Connection[Any], name: str) -> bool:
    """Hold nothing for `name` any more. → whether it was there. (In SQL: `delete from outbox.follower`.)"""
    return conn.execute(sql.load("follower_remove"), {"name": name}).fetchone() is not None


def find(conn: psycopg.Connection[Any]) -> list[Follower]:
    """All followers, the one that is furthest back first."""
    return [Follower(*row) for row in conn.execute(sql.load("follower_find"))]
