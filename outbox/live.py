"""What is live: the content that each key of a participant has, by base and log, at a tick.

The state that a participant should have is not kept anywhere: it follows from the log. Of every key the last `put`
counts, unless a `delete` came after it; other actions are events and leave nothing behind. What was never applied
(parked, skipped by an operator, recalled by a saga) doesn't count. Scrub compares a participant with this, resilver
builds one from it, and retention carries it into the base.

Reads only; nothing here is durable or locks anybody out, but the transaction is open while it is read, and the server
sorts the participant's keys once.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Any

import psycopg

from outbox import horizon, sql
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.log import Slots
from outbox.tick import Tick

FETCH = 1000
"""Rows that come at a time."""


def puts(
    conn: psycopg.Connection[Any],
    target: str,
    at: Tick,
    *,
    slots: Slots | None = None,
    after: str = "",
    keys: Collection[str] | None = None,
) -> Generator[Intent]:
    """The last put of each live key of `target`, in order of the keys' bytes, after key `after`; only of `keys`, if
    they are given.

    Opens a transaction on `conn` for as long as it is read; `conn` must not be in one. Memory is that of `FETCH` rows.
    Whoever asks for another tick than the newest is a follower (`outbox.follower`) at that tick meanwhile, because the
    base is what was live at the horizon. Raises `NotReady` for a tick before that.
    """
    slots = slots or Slots()
    parameters = {
        "target": target,
        "slot_low": slots.low,
        "slot_high": slots.high,
        "after": after,
        "keys": None if keys is None else list(keys),
        "first": at.first,
        "high": at.high,
        "snapshot": at.snapshot,
    }
    with conn.transaction():
        begins = horizon.read(conn).tick
        if at.id < begins:
            raise NotReady(
                f"the log goes back to tick {begins} only, so nobody knows what was live at tick {at.id}: "
                "ask for a later one"
            )
        # Worker connections forbid what a hot path must not do; this reads everything, once.
        conn.execute("set local enable_seqscan = on")
        with conn.cursor(name="outbox_live") as cursor:
            cursor.itersize = FETCH
            cursor.execute(sql.load("live_puts"), parameters)
            for row in cursor:
                yield Intent(*row)


def count(conn: psycopg.Connection[Any], target: str, at: Tick) -> int:
    """How many keys of `target` are live. Reads as much as `puts` does, and sends nothing."""
    with conn.transaction():
        conn.execute("set local enable_seqscan = on")
        parameters = {"target": target, "first": at.first, "high": at.high, "snapshot": at.snapshot}
        row = conn.execute(sql.load("live_count"), parameters).fetchone()
    assert row is not None  # noqa: S101 - a count has one row
    return int(row[0])
