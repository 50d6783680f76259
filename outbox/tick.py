"""Ticks: stored snapshots of Postgres, between which the intents lie in batches.

The algorithm is that of PgQ (Skytools): what is visible in snapshot k and not in snapshot j is a
batch of whole transactions. One process takes ticks (`workers.clock`); every reader uses them.

A tick is durable when `take` returns, and with it every commit that its snapshot sees: its transaction
commits with `synchronous_commit` on, whatever the applications use.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from outbox import horizon, sql
from outbox.errors import Fenced, NotThisLog
from outbox.failpoint import hit
from outbox.position import Position

CHANNEL = "outbox_tick"
"""The clock notifies on this channel after each tick with its number; nobody else does, but for operators."""

DECIDED = "decided"
"""What is notified instead of a tick's number when an operator has decided about parked intents."""

REMEDY = "remove the participant's own data, so that it is rebuilt from this log"
"""What helps a participant whose position is not of this log, unless it knows better itself."""


class Snapshot(NamedTuple):
    """A `pg_snapshot`: transactions before `xmin` had ended, those from `xmax` on had not, nor had `running`."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(","))) if running else frozenset())

    def ended(self, xid: int) -> bool:
        """Whether the transaction had ended (committed or not) when the snapshot was taken."""
        return xid < self.xmax and xid not in self.running


class Tick(NamedTuple):
    """A stored snapshot, with bounds on the ids of the log that hold for it."""

    id: int
    #: The previous tick's `low`: a transaction not yet visible as running here has ids above it.
    floor: int
    #: The log's sequence, read before the tick's transaction had an xid.
    low: int
    #: The log's sequence, read after the snapshot: no row visible in it has a greater id.
    high: int
    #: The snapshot as Postgres prints it.
    snapshot: str
    #: Random; changes with each owner of the clock and about once a minute.
    nonce: str
    at: datetime

    @property
    def seen(self) -> Snapshot:
        return Snapshot.parse(self.snapshot)

    @property
    def shows_nothing(self) -> bool:
        """Whether no id was drawn yet: the first tick of a log, where a participant begins that holds nothing."""
        return self.high == 0


class Reading(NamedTuple):
    """What the clock sees between ticks."""

    low: int
    seen: Snapshot


def new_nonce() -> str:
    """16 random hex digits."""
    return secrets.token_hex(8)


def poll(conn: psycopg.Connection[Any]) -> Reading:
    """The sequence and the current snapshot, without starting a transaction that has an xid."""
    row = conn.execute(sql.load("tick_poll")).fetchone()
    assert row is not None  # noqa: S101 - a sequence always has its row
    return Reading(row[0], Snapshot.parse(row[1]))


def frontier(conn: psycopg.Connection[Any]) -> int:
    """A fresh xid: every transaction that has drawn an id so far has a smaller one."""
    row = conn.execute("select pg_current_xact_id()::text").fetchone()
    assert row is not None  # noqa: S101 - a select without FROM has one row
    return int(row[0])


def due(last: Tick, frontier: int, reading: Reading) -> bool:
    """Whether a new tick would show readers anything that `last` doesn't.

    `frontier` is an xid that was assigned after the log's sequence had reached `last.high`: every
    transaction that drew an id up to there has a smaller xid. So with an unmoved sequence, only the end of
    one of those transactions matters, not what else the database does.
    """
    if reading.low != last.high:
        return True
    return any(reading.seen.ended(xid) for xid in _unfinished(last.seen, frontier))


def _unfinished(seen: Snapshot, frontier: int) -> list[int]:
    return [*(xid for xid in seen.running if xid < frontier), *range(seen.xmax, frontier)]


def take(conn: psycopg.Connection[Any], epoch: int, low: int, nonce: str) -> Tick:
    """Store a tick, durably, and notify the readers.

    `low` is the sequence as `poll` read it before. Raises `Fenced` if another clock took over.
    """
    row = conn.execute(sql.load("tick_take"), {"epoch": epoch, "low": low, "nonce": nonce}).fetchone()
    if row is None:
        raise Fenced("another clock has taken over: this one stops")
    hit("tick.taken")
    return Tick(*row[:7])


def latest(conn: psycopg.Connection[Any]) -> Tick:
    """The newest tick; there is always one."""
    row = conn.execute(sql.load("tick_latest")).fetchone()
    if row is None:
        raise NotThisLog("the log has no tick at all: restore outbox.tick from the backup that outbox.log is from")
    return Tick(*row)


def check_history(conn: psycopg.Connection[Any]) -> None:
    """Raise `NotThisLog` if the ticks were not taken by this server: the log was restored from a dump.

    Transaction numbers mean nothing in another server. Going on would skip every intent that was not applied when
    the dump was made, in silence.
    """
    row = conn.execute(sql.load("tick_history")).fetchone()
    if row is None or not all(row):
        raise NotThisLog(
            "this log was restored from a dump, and its ticks mean nothing in this server. Nothing was skipped. "
            "Restore a physical backup (pg_basebackup) instead; or, if all lanes had drained when the dump was made, "
            "see docs/explanation/log-and-ticks.md"
        )


def match(conn: psycopg.Connection[Any], position: Position, remedy: str = REMEDY) -> Position:
    """`position` as a place where reading of this log can go on (log matching).

    If its tick was thinned, that is the nearest kept tick before it: some intents come again, which
    participants that keep their position take. Raises `NotThisLog` when the position comes from a history
    that this database doesn't have: another database, one restored to an earlier time, or a standby that
    had not received everything; or when it is older than the log goes back (`outbox.horizon`). Its text ends with
    `remedy`.
    """
    identity = conn.execute("select log from outbox.identity").fetchone()
    if identity is None or identity[0] != position.log:
        raise _not_this_log(position, remedy, "another database's log")
    horizon.check(conn, position, remedy)
    around = [Tick(*row) for row in conn.execute(sql.load("tick_get"), {"id": position.tick})]
    before = [tick for tick in around if tick.id <= position.tick]
    after = [tick for tick in around if tick.id > position.tick]
    if before and before[0].id == position.tick:
        if before[0].nonce != position.nonce:
            raise _not_this_log(position, remedy, "a history of this log that was restored to an earlier time")
        if position.upto and not _exists(conn, position.upto):
            return position._replace(upto=0, after=0)
        return position
    if not after:
        raise _not_this_log(position, remedy, "a future that this log doesn't have: it was restored to an earlier time")
    if not before or after[0].nonce != position.nonce:
        raise _not_this_log(position, remedy, "a history of this log that was restored to an earlier time")
    return Position(position.log, before[0].id, before[0].nonce)


def get(conn: psycopg.Connection[Any], tick: int) -> Tick:
    """The tick with this id. Raises `NotThisLog` if it isn't there."""
    for row in conn.execute(sql.load("tick_get"), {"id": tick}):
        if row[0] == tick:
            return Tick(*row)
    raise NotThisLog(f"tick {tick} is not in this log: run `outbox status` to see where each lane stands")


def _exists(conn: psycopg.Connection[Any], tick: int) -> bool:
    return conn.execute("select from outbox.tick where id = %s", (tick,)).fetchone() is not None


def _not_this_log(position: Position, remedy: str, whose: str) -> NotThisLog:
    return NotThisLog(
        f"position {position} belongs to {whose}. Nothing was skipped. Either set OUTBOX_DATABASE to the database "
        f"that it was fed from, or {remedy}"
    )
