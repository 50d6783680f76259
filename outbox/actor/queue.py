"""A queue in the database: made known, waited for, flushed.

Called by `outbox.actor.broker`. Queues are registered the first time that something is sent to one, or a worker looks
into it; not when an actor is declared, which happens on import.
"""

from __future__ import annotations

import time

from dramatiq import QueueJoinTimeout

from outbox.database import Connection
from outbox.errors import WaitTimeout

LOOK_EVERY = 0.02
"""Seconds between looks while waiting for a queue."""

TICK_WITHIN = 60.0
"""Seconds that a flush waits for the clock."""


def declare(conn: Connection, target: str, lanes: int) -> None:
    """Make a queue known with so many lanes; one that is known keeps those that it has."""
    conn.execute("select outbox.declare_queue(%s, %s::int)", (target, lanes))


def join(conn: Connection, target: str, timeout: float | None) -> None:
    """Wait until all that was committed for the queue is done, or given up. Raises `QueueJoinTimeout`."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not _true(conn, "select outbox.queue_idle(%s)", target):
        if deadline is not None and time.monotonic() > deadline:
            raise QueueJoinTimeout(
                f"{target} is not done within {timeout:g} s: `outbox status` shows what it waits for"
            )
        time.sleep(LOOK_EVERY)


def flush(conn: Connection, target: str) -> None:
    """Drop what the queue has. Raises `WaitTimeout` when the clock doesn't run."""
    deadline = time.monotonic() + TICK_WITHIN
    while not _true(conn, "select outbox.flush_queue(%s)", target):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{target} can't be flushed while no clock runs: start `outbox work clock`")
        time.sleep(LOOK_EVERY)
    conn.execute("select outbox.rate_forget()")


def _true(conn: Connection, query: str, target: str) -> bool:
    row = conn.execute(query.encode(), (target,)).fetchone()
    return row is not None and row[0] is True
