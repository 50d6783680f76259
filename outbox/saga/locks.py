"""Semantic locks: names that a saga holds from before its first step until it has ended.

A saga asks for all of its locks at once, and all requests are in one order, so two sagas never hold what the other
waits for. What is left is a saga that waits for its own ancestor through a child: that is found, and refused.

Called by `workers.drive` in the engine's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

import psycopg

from outbox import sql


def take(
    conn: psycopg.Connection[Any], saga: UUID, names: Sequence[str], parent: UUID | None
) -> Literal["held", "waits", "deadlock"]:
    """Take the locks, or queue for them; the saga's row exists. Nothing is left behind in a deadlock."""
    _serialise(conn)
    conn.execute(sql.load("saga_lock_ask"), {"saga": saga, "names": list(names)})
    row = conn.execute(sql.load("saga_lock_hold"), {"saga": saga}).fetchone()
    if row is not None and row[0]:
        return "held"
    if parent is not None:
        row = conn.execute(sql.load("saga_lock_cycle"), {"saga": saga}).fetchone()
        if row is not None and row[0]:
            conn.execute(sql.load("saga_lock_drop"), {"ids": [saga]})
            return "deadlock"
    return "waits"


def release(conn: psycopg.Connection[Any], sagas: Sequence[UUID]) -> None:
    """Give the locks of sagas that have ended to those that have waited longest, and tell these.

    Two statements, for any number of sagas and of those that wait.
    """
    _serialise(conn)
    names = [row[0] for row in conn.execute(sql.load("saga_lock_drop"), {"ids": list(sagas)})]
    if names:
        conn.execute(sql.load("saga_lock_grant"), {"names": names})


def _serialise(conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pg_advisory_xact_lock(hashtextextended('outbox.saga_lock', 0))")
