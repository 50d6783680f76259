"""Receipts: attempts and proofs of effects that can't be made twice harmlessly and can't be looked up later.

`opened` is durable before the attempt is made; `prepared`, for effects made in two phases, before the second;
`record` is durable with the lane's position. What a dead owner left open is in doubt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import Fenced
from outbox.intent import Intent
from outbox.lane import Lane
from outbox.participant import Doubt


class Record(NamedTuple):
    """What is known of an attempt now."""

    id: int
    #: closed: done for good. partial: a part is done, the rest will be retried. open: not known. prepared: takes
    #: effect by a release, which can be repeated.
    state: Literal["open", "prepared", "partial", "closed"]
    evidence: dict[str, Any]


def opened(conn: psycopg.Connection[Any], lane: Lane, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Record attempts. → what is known of each that may be made; one that is closed already is left out."""
    rows = conn.execute(
        sql.load("receipt_open"),
        {"target": lane.target, "lane": lane.lane, "epoch": lane.epoch, "ids": list(ids)},
    ).fetchall()
    if not rows and ids:
        with conn.transaction():
            lane.fence(conn)  # Fenced, or else all of them were closed
    return {row[0]: row[1] for row in rows}


def prepared(conn: psycopg.Connection[Any], lane: Lane, records: Sequence[Record]) -> None:
    """Store what is known of a batch before its prepared effects are released; durable when it returns.

    One round trip. Raises `Fenced`: then nothing may be released.
    """
    lane.check(conn)
    done = conn.execute(
        sql.load("receipt_prepare"),
        {"target": lane.target, "lane": lane.lane, "epoch": lane.epoch, **_columns(records)},
    )
    if done.rowcount != len(records):
        raise Fenced(
            f"lane {lane} has a new owner, or its receipts were changed by hand: it releases nothing, and stops"
        )


def record(conn: psycopg.Connection[Any], records: Sequence[Record], without_effect: Sequence[int]) -> None:
    """Store outcomes, and forget the attempts that are known to have had no effect at all."""
    if records:
        conn.execute(sql.load("receipt_close"), _columns(records))
    if without_effect:
        conn.execute(sql.load("receipt_drop"), {"ids": list(without_effect)})


def _columns(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "id": [r.id for r in records],
        "state": [r.state for r in records],
        "evidence": [json.dumps(r.evidence) for r in records],
    }


def doubts(conn: psycopg.Connection[Any], lane: Lane) -> list[Doubt]:
    """What earlier owners of the lane left open."""
    rows = conn.execute(
        sql.load("receipt_doubts"),
        {
            "target": lane.target,
            "epoch": lane.epoch,
            "slot_low": lane.slots.low,
            "slot_high": lane.slots.high,
        },
    )
    return [Doubt(Intent._make(row[:8]), *row[8:]) for row in rows]
