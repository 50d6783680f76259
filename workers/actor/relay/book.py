"""The book: what Postgres knows of relayed queues, and of steps of sagas that were handed on.

Everything here is durable when it returns. Called by the other modules of the relay. Raises `NotReady` for a queue that
can't be relayed, or given back, just now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from outbox import sql
from outbox.database import Connection
from outbox.errors import NotReady
from outbox.participant import LaneView

SILENCE = 86400.0
"""Seconds after which a step that was handed on, and not heard of, is parked for an operator."""

KEPT = 7 * 86400.0
"""Seconds that what the far side has told is remembered: it may tell it again, and a lane may hand it on again."""


class Told(NamedTuple):
    """What the far side says became of a message."""

    id: int
    #: dramatiq's id.
    message: str
    verdict: str
    error: str


def assign(conn: Connection, target: str, *, relayed: bool) -> bool:
    """Make a queue a relayed one, or one that is worked here again. → whether it was not."""
    try:
        row = conn.execute("select outbox.relay_queue(%s, %s)", (target, relayed)).fetchone()
    except psycopg.DatabaseError as error:
        if error.sqlstate not in ("OB003", "OB070"):
            raise
        raise NotReady(f"{error.diag.message_primary}. {error.diag.message_hint}") from None
    return row is not None and row[0] is True


def targets(conn: Connection) -> list[str]:
    """The queues that are relayed."""
    return [row[0] for row in conn.execute("select target from outbox.relay order by target")]


def note(conn: Connection, lane: LaneView, ids: Sequence[int]) -> set[int]:
    """Steps of sagas are about to be handed on. → those to hand on: the far side hasn't told of them."""
    parameters = {"target": lane.target, "lane": lane.lane, "epoch": lane.epoch, "ids": list(ids)}
    return {row[0] for row in conn.execute(sql.load("relay_note"), parameters)}


def hear(conn: Connection, told: Sequence[Told]) -> None:
    """Record what the far side says. Said again, nothing happens."""
    parameters = {
        "ids": [one.id for one in told],
        "messages": [one.message for one in told],
        "verdicts": [one.verdict for one in told],
        "errors": [one.error for one in told],
    }
    conn.execute(sql.load("relay_told"), parameters)


def keep_house(conn: Connection) -> list[int]:
    """Park what was not heard of for long, and forget what is over. → what was parked."""
    silent = [row[0] for row in conn.execute(sql.load("relay_silent"), {"silence": SILENCE})]
    conn.execute(sql.load("relay_forget"), {"age": KEPT})
    return silent
