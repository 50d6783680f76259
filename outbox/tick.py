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

from outbox import era, horizon, sql
from outbox.errors import Fenced, NotThisLog, WentBack
from outbox.failpoint import hit
from outbox.position import Position

CHANNEL = "outbox_tick"
"""The clock notifies on this channel after each tick with its number; nobody else does, but for operators."""

HALTED = "halted"
"""What is notified instead when nothing may go on in this era (`outbox.era`)."""

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
    #: A bound on the ids of its era (`outbox.era`): all that is below is shown.
    first: int

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
        era.check(conn)
        raise Fenced("another clock has taken over: this one stops")
    hit("tick.taken")
    return Tick(*row[:8])


def latest(conn: psycopg.Connection[Any]) -> Tick:
    """The newest tick; there is always one."""
    return _only(conn.execute(sql.load("tick_latest")).fetchone())


def first(conn: psycopg.Connection[Any]) -> Tick:
    """The oldest tick: where a participant begins that holds nothing."""
    return _only(conn.execute(sql.load("tick_first")).fetchone())


def _only(row: tuple[Any, ...] | None) -> Tick:
    if row is None:
        raise NotThisLog("the log has no tick at all: restore outbox.tick from the backup that outbox.log is from")
    return Tick(*row)


def match(conn: psycopg.Connection[Any], position: Position, remedy: str = REMEDY) -> Position:
    """`position` as a place where reading of this log can go on (log matching).

    If its tick was thinned, that is the nearest kept tick before it: some intents come again, which
    participants that keep their position take. Raises `NotThisLog` when the position comes from a history
    that this database doesn't have: another database, or what was lost when this one was adopted; or when it is older
    than the log goes back (`outbox.horizon`); its text ends with `remedy`. Raises `WentBack` when the log went back
    and nobody has adopted it.
    """
    if era.identity(conn) != position.log:
        raise NotThisLog(
            f"position {position} belongs to another database's log. Nothing was skipped. Either set OUTBOX_DATABASE "
            f"to the database that it was fed from, or {remedy}"
        )
    horizon.check(conn, position, remedy)
    before, after = around(conn, position.tick)
    if before is None or not _known(position, before, after):
        raise _elsewhere(conn, position, remedy)
    if before.id != position.tick:
        return Position(position.log, before.id, before.nonce)
    if position.upto and not _exists(conn, position.upto):
        # Thinned, unless it lies in what the log lost: then the batch is not the one that it was.
        if around(conn, position.upto)[1] is None or _lost(conn, position.upto):
            raise _elsewhere(conn, position, remedy)
        return position._replace(upto=0, after=0)
    return position


def around(conn: psycopg.Connection[Any], tick: int) -> tuple[Tick | None, Tick | None]:
    """The nearest ticks that are there: this one or before, and after."""
    found = [Tick(*row) for row in conn.execute(sql.load("tick_get"), {"id": tick})]
    before = next((one for one in found if one.id <= tick), None)
    return before, next((one for one in found if one.id > tick), None)


def _known(position: Position, before: Tick, after: Tick | None) -> bool:
    """Whether its tick is there with its nonce, or was thinned: the last one of each nonce never is."""
    if before.id == position.tick:
        return before.nonce == position.nonce
    return after is not None and after.nonce == position.nonce


def _lost(conn: psycopg.Connection[Any], tick: int) -> bool:
    return conn.execute(sql.load("era_lost"), {"tick": tick}).fetchone() is not None


def _elsewhere(conn: psycopg.Connection[Any], position: Position, remedy: str) -> NotThisLog:
    """What to raise for a position that isn't of this history."""
    newest = era.look(conn)
    if newest.number > 1 and position.tick < newest.opened:
        return NotThisLog(
            f"position {position} is of a time that this log has lost: the database was restored to an earlier one "
            f"(adopted {newest.at:%Y-%m-%d %H:%M %Z}, era {newest.number}). Nothing was skipped: {remedy}"
        )
    says = (
        f"position {position} was seen, and this log doesn't have it: the log was restored to an earlier time, or the "
        "position is from a copy of it that went on"
    )
    return WentBack(f"{says}. {era.REMEDY}", says)


def reach(conn: psycopg.Connection[Any], start: Tick, end: Tick) -> Tick:
    """How far reading from `start` towards `end` can go in one batch: to the end of `start`'s era.

    From an era's last tick that is the next era's first one, and nothing lies between the two. Raises `WentBack`
    when `end` is before `start`. What the first tick doesn't show is all that another one does, of whichever era.
    """
    if end.id >= start.id and (end.first == start.first or start.shows_nothing):
        return end
    if end.id < start.id:
        says = f"tick {start.id} was seen, and the log's last one is {end.id}: the log was restored to an earlier time"
        raise WentBack(f"{says}. {era.REMEDY}", says)
    # Xids of two servers can't be compared, so no batch goes from one era into another.
    for row in conn.execute(sql.load("tick_reach"), {"id": start.id, "first": start.first}):
        return Tick(*row)
    raise NotThisLog(f"the end of tick {start.id}'s era is not in this log: restore outbox.tick and outbox.era")


def same_place(start: Tick, end: Tick) -> bool:
    """Whether nothing lies between them: an era's end, and the next one's start. `end` is what `reach` gave."""
    return end.first != start.first and not start.shows_nothing


def get(conn: psycopg.Connection[Any], tick: int) -> Tick:
    """The tick with this id. Raises `NotThisLog` if it isn't there."""
    for row in conn.execute(sql.load("tick_get"), {"id": tick}):
        if row[0] == tick:
            return Tick(*row)
    raise NotThisLog(f"tick {tick} is not in this log: run `outbox status` to see where each lane stands")


def _exists(conn: psycopg.Connection[Any], tick: int) -> bool:
    return conn.execute("select from outbox.tick where id = %s", (tick,)).fetchone() is not None
