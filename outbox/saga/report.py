"""How a participant's worker tells the engine what became of a step's intent.

Called by `workers.reader` for batches that have intents of sagas, in the transaction that records the same for the
lane: a report is durable with the position, or neither is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import Fenced
from outbox.lane import Lane


class Report(NamedTuple):
    """What became of one intent."""

    id: int
    #: unknown: it may have happened, and nobody will ever know.
    verdict: Literal["applied", "failed", "void", "unknown"]
    error: str = ""


def send(conn: psycopg.Connection[Any], lane: Lane, reports: Sequence[Report]) -> None:
    """Append an outcome for the engine for each; what wasn't applied is void from now on.

    Of intents of this lane only. Raises `Fenced` when it has another owner.
    """
    if reports:
        row = conn.execute(
            sql.load("saga_report"),
            {
                "target": lane.target,
                "lane": lane.lane,
                "epoch": lane.epoch,
                "ids": [r.id for r in reports],
                "verdicts": [r.verdict for r in reports],
                "errors": [r.error for r in reports],
            },
        ).fetchone()
        if row is None or not row[0]:
            raise Fenced(f"lane {lane} has a new owner: it reports nothing")


def send_of_actors(conn: psycopg.Connection[Any], reports: Sequence[Report]) -> None:
    """The same for messages of actors. One that is running may outlive its lane's owner: its holder reports it."""
    if reports:
        parameters = {
            "ids": [r.id for r in reports],
            "verdicts": [r.verdict for r in reports],
            "errors": [r.error for r in reports],
        }
        conn.execute(sql.load("actor_report"), parameters)


def void(conn: psycopg.Connection[Any], ids: Sequence[int]) -> dict[int, bool]:
    """Which of these the engine has recalled, or were given up before. → for each: whether its saga was told."""
    return {row[0]: row[1] for row in conn.execute(sql.load("saga_void"), {"ids": list(ids)})}


def tried(conn: psycopg.Connection[Any], ids: Sequence[int]) -> set[int]:
    """Which of these may have had an effect, by their receipts."""
    return {row[0] for row in conn.execute(sql.load("saga_tried"), {"ids": list(ids)})}


def blocked(conn: psycopg.Connection[Any], lane: Lane) -> set[int]:
    """The recalled intents of a lane that wait behind another one of their key."""
    parameters = {"target": lane.target, "slot_low": lane.slots.low, "slot_high": lane.slots.high}
    return {row[0] for row in conn.execute(sql.load("saga_blocked"), parameters)}


def hurry(conn: psycopg.Connection[Any], lane: Lane) -> None:
    """Give parked intents that were recalled their turn: their saga waits for the answer."""
    conn.execute(
        sql.load("saga_hurry"),
        {"target": lane.target, "slot_low": lane.slots.low, "slot_high": lane.slots.high},
    )
