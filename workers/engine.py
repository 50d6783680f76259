"""The saga engine: the participant `saga`, drained through ticks like any other.

What it reads are the starts of sagas, the outcomes of their steps, signals, timers and what operators ask for; what
it makes of a batch (new states, next intents, what function steps wrote) is one transaction. Every change is computed
by `outbox.saga.machine`; `workers.drive` carries it out.

A batch that was committed and is read again (the engine died before its position was written) finds the sagas
beyond its events, and changes nothing. Durable when `apply` returns: everything.

Raises `Fenced` when the lane has a new owner, `psycopg.OperationalError` when the database is lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from outbox import sql
from outbox.database import connect
from outbox.errors import Fenced
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.log import no_collection
from outbox.participant import Doubt, Evidence, Item, LaneView, Outcome
from outbox.position import Position
from outbox.saga import store
from outbox.saga.registry import Definitions
from outbox.settings import Settings
from workers.drive import Drive
from workers.stepwork import Stepwork

logger = logging.getLogger("outbox.saga")

EARLY_KEPT = 30 * 86400.0
"""Seconds that a signal waits for a saga that doesn't start."""

EXPIRE_EVERY = 3600.0
"""Seconds between looks at what has waited so long."""

WAKE_LIMIT = 1000
"""Timers that ring in one transaction."""


class Engine:
    """Drives the sagas of one lane."""

    batch_limit = 1000
    batch_bytes = 4_000_000
    records_attempts = False
    keeps_position = False

    def __init__(self, settings: Settings, definitions: Definitions) -> None:
        self._settings = settings
        self._definitions = definitions
        self._lane: LaneView
        self._connection: sa.Connection | None = None
        self._work: Stepwork
        self._expired_at = -EXPIRE_EVERY

    def open(self, lane: LaneView) -> None:
        self._lane = lane
        self._close()
        url = self._settings.database

        def driver() -> psycopg.Connection[Any]:
            made = connect(url, name=f"engine {lane.target}/{lane.lane}")
            made.autocommit = False
            return made

        engine = sa.create_engine("postgresql+psycopg://", creator=driver, poolclass=NullPool)
        try:
            self._connection = engine.connect()
        except sa.exc.DBAPIError as error:
            raise _ours(error) from error
        self._work = Stepwork(self._connection, self._settings)
        with self._transaction() as driver_connection:
            store.publish(driver_connection, self._definitions)

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Connection[Any]]:
        """A transaction that holds the lane. → the driver's connection, inside it."""
        connection = self._connection
        assert connection is not None  # noqa: S101 - the reader opens before it applies
        try:
            with connection.begin():
                driver: Any = connection.connection.dbapi_connection
                row = driver.execute(sql.load("lane_fence"), self._me).fetchone()
                if row is None:
                    raise Fenced(f"lane {self._lane.target}/{self._lane.lane} has a new owner: it stops")
                yield driver
        except sa.exc.DBAPIError as error:
            raise _ours(error) from error

    @property
    def _me(self) -> dict[str, Any]:
        return {"target": self._lane.target, "lane": self._lane.lane, "epoch": self._lane.epoch}

    def position(self) -> Position | None:
        return None

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002 - kept by the lane
        with no_collection(), self._transaction() as driver:
            outcomes = Drive(driver, self._definitions, self._work).run(batch)
            hit("saga.written")
        hit("saga.committed")
        return outcomes

    def wake(self) -> bool:
        """Turn the timers that are due into intents. → whether there were any."""
        assert self._connection is not None  # noqa: S101 - as above
        driver: Any = self._connection.connection.dbapi_connection
        found = driver.execute(sql.load("saga_wake"), {**self._me, "limit": WAKE_LIMIT}).rowcount
        driver.commit()
        if time.monotonic() - self._expired_at > EXPIRE_EVERY:
            self._expire(driver)
        return bool(found)

    def _expire(self, driver: psycopg.Connection[Any]) -> None:
        """Forget signals that have waited too long for their saga."""
        self._expired_at = time.monotonic()
        for saga, action in driver.execute(sql.load("saga_early_expire"), {"seconds": EARLY_KEPT, "limit": WAKE_LIMIT}):
            logger.warning(
                "a %s waited %d days for saga %s, which never started: dropped", action, EARLY_KEPT // 86400, saga
            )
        driver.commit()

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Attempts are not recorded: a transaction is committed or not."""

    def settle(self, batch: Sequence[Intent]) -> None:
        """There is nothing to tidy up."""

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        return [(Evidence.UNKNOWN, None) for _ in doubts]

    def inventory(self) -> Iterator[Item]:
        return iter(())

    def close(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _ours(error: sa.exc.DBAPIError) -> BaseException:
    """The driver's own error, which the worker knows what to do about."""
    return error.orig if isinstance(error.orig, psycopg.Error) else error
