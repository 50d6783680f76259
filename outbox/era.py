"""Eras: whether the log goes on where it was written, and how it is taken over where it doesn't.

The snapshots and xids of the log mean something only in the server that drew them, and a log that went back to an
earlier time has forgotten effects that were made. So the log has eras: the newest is written in this server, on this
timeline; in any other server, no lane goes on until an operator has adopted the log, which opens the next era.
docs/explanation/histories.md tells why that is enough.

`check` is called by every owner of a lane when it has claimed it, and takes two round trips at most. `halt` is how a
participant that remembers more than the log stops all the others; it is durable when it returns. The next era is
opened by `outbox.adoption`.

Errors: `NotThisLog` when this is not the server that the log goes on in.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import NotThisLog

REMEDY = (
    "Nothing was skipped, and no lane goes on. To go on in this database, run `outbox adopt`: it shows first what was "
    "not done, and what may have been"
)
"""What helps, after the sentence that says what happened."""

Kind = Literal["dump", "upgrade", "copy", "timeline", "halted"]


class Trouble(NamedTuple):
    """Why the log can't go on here."""

    kind: Kind
    #: One sentence, or two.
    says: str


class Era(NamedTuple):
    """The newest era of the log."""

    number: int
    #: Its first tick.
    opened: int
    #: A bound on its ids: nothing written in it has a smaller one.
    first: int
    at: datetime
    #: Why no lane may go on here; None if all is well.
    trouble: Trouble | None


_SAYS: dict[Kind, str] = {
    "dump": "this log was restored from a dump: its ticks and transactions are another server's",
    "upgrade": "this server is not the one that the log was written in, and has its files: pg_upgrade leaves that",
    "copy": (
        "this database was copied from another one of this server, whose workers may be at work for the same "
        "participants: if they are, point these at others"
    ),
    "timeline": "this server was restored to an earlier time, or is a standby that was promoted",
}


def look(conn: psycopg.Connection[Any]) -> Era:
    """The newest era, and what is wrong with it here."""
    row = conn.execute(sql.load("era_look")).fetchone()
    if row is None:
        raise NotThisLog("the log has no era: restore outbox.era from the backup that outbox.log is from")
    number, opened, first, at, halted, server, relation, database, timeline, ticks = row
    kind: Kind | None = None
    if not (relation and ticks):
        kind = "dump"
    elif not server:
        kind = "upgrade"
    elif database is False:
        kind = "copy"
    elif not timeline:
        kind = "timeline"
    trouble = Trouble(kind, _SAYS[kind]) if kind else Trouble("halted", halted) if halted else None
    return Era(number, opened, first, at, trouble)


def check(conn: psycopg.Connection[Any]) -> Era:
    """The era, if the log goes on in this server. Raises `NotThisLog`, with what this looks like."""
    era = look(conn)
    if era.trouble:
        raise NotThisLog(f"{era.trouble.says}. {REMEDY}")
    # Not before a worker comes: a database that was never drained may be copied.
    conn.execute("update outbox.era set database = (outbox.here()).database where database is null")
    return era


def identity(conn: psycopg.Connection[Any]) -> str:
    """Which log this is: what a position begins with. Raises `NotThisLog` when it has none."""
    row = conn.execute("select log from outbox.identity").fetchone()
    if row is None:
        raise NotThisLog("the log has no identity: restore outbox.identity from the backup that outbox.log is from")
    return str(row[0])


def halt(conn: psycopg.Connection[Any], says: str) -> None:
    """Stop all lanes in this era, and say why. The first reason stays. Durable when it returns."""
    conn.execute(sql.load("era_halt"), {"says": says})
