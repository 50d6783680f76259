"""Limits: what dramatiq's rate limiters, mutexes and barriers count, in Postgres.

    limits = OutboxLimits(broker)
    broker.add_middleware(GroupCallbacks(limits))
    with ConcurrentRateLimiter(limits, "one at a time").acquire(): ...

Each call is a transaction of its own, durable when it returns, and exact over any number of processes. Numbers run out
by the database's clock; the names that `WindowRateLimiter` and `BucketRateLimiter` give their windows come from the
clock of each process. To limit how often an actor begins, say `rate_limit` at the actor instead (`outbox.actor.rate`):
its messages wait for their turn and fail for nothing.

What middleware counts down once a message is done (`GroupCallbacks`, at a group's barrier) counts once per message: one
that runs again, because its worker was killed before it was acknowledged, doesn't open the barrier early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dramatiq.rate_limits import RateLimiterBackend

from outbox import sql
from outbox.actor import bell
from outbox.actor.delivered import FINISHING
from outbox.actor.results import store
from outbox.database import Connection
from outbox.failpoint import hit

if TYPE_CHECKING:
    from outbox.actor.broker import OutboxBroker


class OutboxLimits(RateLimiterBackend):
    """A backend of rate limiters in the database of a broker. Making one connects to nothing. Times: milliseconds.

    Raises dramatiq's `ConnectionFailed`, and `ConnectionClosed` when nobody knows whether it was counted.
    """

    def __init__(self, broker: OutboxBroker) -> None:
        self._broker = broker

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Set a number that isn't there. → whether it wasn't."""
        return self._broker.run(lambda conn: _added(conn, key, value, ttl))

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Count up, at most to `maximum`. → whether it was."""
        return self._change(key, amount, None, maximum, ttl)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Count down, at least to `minimum`. → whether it was."""
        message = FINISHING.get()
        if message is None:
            return self._change(key, -amount, minimum, None, ttl)

        def counted(conn: Connection) -> bool:
            with conn.transaction():
                if message.result is not None:
                    # Whoever is called when the group is complete finds the results of all of it.
                    store(conn, [message.result])
                return _changed(conn, key, -amount, minimum, None, ttl, party=message.id)

        done = self._broker.run(counted)
        message.result = None
        hit("actor.counted")
        return done

    def _change(self, key: str, delta: int, low: int | None, high: int | None, ttl: int) -> bool:
        return self._broker.run(lambda conn: _changed(conn, key, delta, low, high, ttl))

    def incr_and_sum(self, key: str, keys: Callable[[], Sequence[str]], amount: int, maximum: int, ttl: int) -> bool:
        """Count up, unless all of `keys()` would come to more than `maximum`. → whether it was."""

        def counted(conn: Connection) -> bool:
            with conn.transaction():
                conn.execute(sql.load("tally_gate"), {"keys": [key, *keys()]})
                # Asked again: time has gone by while others were counting.
                row = conn.execute(sql.load("tally_sum"), {"keys": list(keys())}).fetchone()
                if row is None or row[0] + amount > maximum:
                    return False
                return _changed(conn, key, amount, None, maximum, ttl)

        return self._broker.run(counted)

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait until somebody has called `wait_notify`. → whether that was within `timeout`; None: wait for ever."""

        def waited(conn: Connection) -> bool:
            def look() -> bool | None:
                return conn.execute(sql.load("tally_get"), {"key": key}).fetchone() is not None or None

            return bool(bell.wait(conn, key, look, None if timeout is None else timeout / 1000))

        return self._broker.run(waited)

    def wait_notify(self, key: str, ttl: int) -> None:
        """Let all go on who wait for `key`, and who come within `ttl`."""

        def notify(conn: Connection) -> None:
            with conn.transaction():
                _added(conn, key, 1, ttl)
                conn.execute("select outbox.ring(array[%s])", (key,))

        self._broker.run(notify)


def _added(conn: Connection, key: str, value: int, ttl: int) -> bool:
    return _true(conn, "tally_add", {"key": key, "value": value, "ttl": ttl / 1000})


def _changed(  # noqa: PLR0917 - as dramatiq's methods have them
    conn: Connection, key: str, delta: int, low: int | None, high: int | None, ttl: int, *, party: int | None = None
) -> bool:
    change = {"key": key, "delta": delta, "low": low, "high": high, "ttl": ttl / 1000, "party": party}
    return _true(conn, "tally_change", change)


def _true(conn: Connection, statement: str, parameters: Mapping[str, object]) -> bool:
    row = conn.execute(sql.load(statement), parameters).fetchone()
    return row is not None and row[0] is True
