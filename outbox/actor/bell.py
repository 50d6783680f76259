"""The bell: waiting for a row that another process writes.

Whoever writes it rings (the SQL function `outbox.ring`, in the transaction that writes), and whoever waits listens.
Keys share 256 channels, so that neither side has much to do with what is not its own. A bell that isn't heard costs a
second; through a pooler, where nothing can be listened to, there are looks at growing intervals.

Called by `outbox.actor.results` and `outbox.actor.limits`, on a connection that nobody else uses meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import md5
from typing import TypeVar

from psycopg.sql import SQL, Identifier

from outbox.database import Connection

LOOK_EVERY = 1.0
"""Seconds between looks while nothing rings: a writer that dies after its commit may not have rung."""

POLL = (0.005, 0.25)
"""Seconds between looks through a pooler: the first ones, and the last ones."""

_Found = TypeVar("_Found")


def channel(key: str) -> str:
    """What is rung when something is written under this key: one of 256."""
    return f"outbox_bell_{md5(key.encode(), usedforsecurity=False).hexdigest()[:2]}"


def wait(conn: Connection, key: str, look: Callable[[], _Found | None], timeout: float | None) -> _Found | None:
    """What `look` finds, as soon as it does. → None after `timeout` seconds without. None: there is no end to it."""
    deadline = None if timeout is None else time.monotonic() + timeout
    found = look()
    if found is not None:
        return found
    if conn.pooled:
        return _poll(look, deadline)
    conn.execute(SQL("listen {}").format(Identifier(channel(key))))
    # What was written before that is there by now; what comes later rings.
    while (found := look()) is None and (left := _left(deadline)) > 0:
        for _ in conn.notifies(timeout=min(left, LOOK_EVERY), stop_after=1):
            pass
    conn.execute("unlisten *")
    return found


def _poll(look: Callable[[], _Found | None], deadline: float | None) -> _Found | None:
    pause = POLL[0]
    while (found := look()) is None and (left := _left(deadline)) > 0:
        time.sleep(min(left, pause))
        pause = min(POLL[1], 1.5 * pause)
    return found


def _left(deadline: float | None) -> float:
    return LOOK_EVERY if deadline is None else deadline - time.monotonic()
