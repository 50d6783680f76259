"""Connections to Postgres, and whether its schema fits this code.

A connection of ours is never waited for without end. A network that swallows packets, or a peer that is suspended,
looks like a slow one: neither side is told. So each side has patience for so many seconds (`connect`), the program
for an answer, and the server for the next statement of a transaction that was begun.

Through a pooler (PgBouncer) a session is no session: each transaction may run on another server connection.
`connect` recognises that, and does without everything that a session would have to remember.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

from outbox.errors import DatabaseNewer, NotMigrated, NotReady

HEAD = "0018"
"""The newest migration that this code knows. Checked against `alembic/versions` by a test."""

PATIENCE = 600.0
"""Seconds, where a caller doesn't say: for commands and housekeeping, whose statements may take their time."""

_Value = TypeVar("_Value")

_NOT_DURABLE = "select where current_setting('synchronous_commit') in ('off', 'local')"
_DURABLE = "select set_config('synchronous_commit', 'on', false)"
_NOT_COMMITTED = "select where current_setting('default_transaction_isolation') <> 'read committed'"
_SESSION = """
select set_config(name, value, false)
  from (values ('idle_in_transaction_session_timeout', %s), ('default_transaction_isolation', 'read committed'),
               ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'),
               ('enable_bitmapscan', 'off'), ('enable_seqscan', 'off'), ('jit', 'off'),
               ('plan_cache_mode', 'force_generic_plan')) as s (name, value)
"""
# Who waits for a lock must then see what was committed meanwhile: with the snapshot of another isolation, which the
# database or the role may have as their default, retention would drop what a lane has just begun to need.
# A transaction of a worker that was cut off or suspended holds its lane's row, and keeps the next owner out.
# The last four: every statement here has an index made for it, and the statistics of a table that only grows are
# always late. With a default of one row expected, Postgres reads and sorts the whole batch for each page (measured:
# six times slower on a batch of 100,000), and plans anew over all partitions each time.


class Connection(psycopg.Connection[Any]):
    """A connection that is lost (psycopg.OperationalError) when the server doesn't answer for `patience` seconds."""

    patience = PATIENCE
    #: Whether a pooler stands before the server: nothing that is set or listened to in the session lasts.
    pooled = False

    def wait(self, gen: PQGen[_Value], *args: Any, **more: Any) -> _Value:
        """psycopg's wait, with an end. Whoever waits for notifications has one of his own."""
        if args or more:
            return super().wait(gen, *args, **more)
        return super().wait(self._patiently(gen))

    def _patiently(self, gen: PQGen[_Value]) -> PQGen[_Value]:
        # Here and not by SO_RCVTIMEO or TCP_USER_TIMEOUT: a proxy on the way confirms what it never hands on.
        deadline = time.monotonic() + self.patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    break
                wanted = gen.send(ready)
        except StopIteration as done:
            value: _Value = done.value
            return value
        self.pgconn.finish()
        raise psycopg.OperationalError(f"no answer for {self.patience:.0f} s")


def connect(url: str, *, name: str, check: bool = True, patience: float = PATIENCE) -> Connection:
    """A connection in autocommit mode, for workers and commands.

    `name` shows up in pg_stat_activity. `patience` is how many seconds either side waits for the other: without an
    answer the connection is lost, and a transaction left lying is rolled back by the server. Peers whose machine is
    gone are noticed within half a minute. Commits wait for the disk even where the server's default says otherwise:
    what a worker has recorded must not be forgotten. Transactions are READ COMMITTED, whatever the server's default is.

    Raises `NotReady` with what to do when the server can't be reached, when the schema doesn't fit, or when there is a
    pooler and commits would not wait for the disk, or transactions would not be READ COMMITTED.
    """
    try:
        conn = Connection.connect(
            url,
            autocommit=True,
            application_name=f"outbox {name}",
            connect_timeout=math.ceil(min(10.0, max(2.0, patience))),
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=25_000,
        )
    except psycopg.OperationalError as error:
        raise Unreachable(f"the database can't be reached ({reason(error)}): is it running?") from error
    except psycopg.ProgrammingError as error:
        raise NotReady(f"the database's URL is not right ({reason(error)}): correct OUTBOX_DATABASE") from error
    try:
        conn.patience = patience
        _set_up(conn)
        if check:
            check_schema(conn)
    except psycopg.OperationalError as error:
        conn.close()
        raise Unreachable(f"the database is lost again at once ({reason(error)}): is it running?") from error
    except BaseException:
        conn.close()
        raise
    return conn


def is_pooled(conn: psycopg.Connection[Any]) -> bool:
    """Whether a pooler stands before the server: it tells clients a process number of its own making."""
    row = conn.execute("select pg_backend_pid()").fetchone()
    return row is None or row[0] != conn.info.backend_pid


def _set_up(conn: Connection) -> None:
    conn.pooled = is_pooled(conn)
    durable = conn.execute(_NOT_DURABLE).fetchone() is None
    if not conn.pooled:
        if not durable:
            conn.execute(_DURABLE)
        conn.execute(_SESSION, (str(round(conn.patience * 1000)),))
        return
    conn.prepare_threshold = None
    if not durable:
        user = conn.info.user
        raise NotReady(
            f"there is a pooler before the database, and commits of {user} don't wait for the disk: "
            f"run ALTER ROLE {user} SET synchronous_commit = on, or connect past the pooler"
        )
    if conn.execute(_NOT_COMMITTED).fetchone() is not None:
        user = conn.info.user
        raise NotReady(
            f"there is a pooler before the database, and transactions of {user} are not READ COMMITTED: "
            f"run ALTER ROLE {user} SET default_transaction_isolation = 'read committed', or connect past the pooler"
        )


class Unreachable(NotReady):
    """The database server doesn't answer; workers try again, commands say so."""


def reason(error: BaseException) -> str:
    """The first line of a database error: no statement, no parameter."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def revision(conn: psycopg.Connection[Any]) -> str | None:
    """The migration that the database is at, or None if it has no outbox schema."""
    row = conn.execute("select to_regclass('outbox.alembic_version') is not null").fetchone()
    if row is None or not row[0]:
        return None
    try:
        row = conn.execute("select version_num from outbox.alembic_version").fetchone()
    except psycopg.errors.InsufficientPrivilege:
        user = conn.info.user
        raise NotReady(
            f"the database user {user} may not use the outbox schema: grant it outbox_app (an application), "
            f"outbox_worker (a worker) or outbox_operator, such as GRANT outbox_worker TO {user}"
        ) from None
    return None if row is None else str(row[0])


def check_schema(conn: psycopg.Connection[Any]) -> None:
    """Raises `NotMigrated` or `DatabaseNewer` unless the database is at `HEAD`."""
    found = revision(conn)
    if found is None:
        raise NotMigrated("the database has no outbox schema: run `outbox migrate`")
    if found != HEAD:
        if found < HEAD:
            raise NotMigrated(f"the database is at migration {found}, this version needs {HEAD}: run `outbox migrate`")
        raise DatabaseNewer(
            f"the database is at migration {found}, newer than this version of outbox knows ({HEAD}): "
            "upgrade the outbox package"
        )


def migrations() -> Path:
    """The folder of migrations: in the installed package, or in a checkout beside it."""
    here = Path(__file__).resolve().parent
    checkout = here.parent / "alembic"
    shipped = here / "_migrations"
    return shipped if shipped.is_dir() else checkout
