"""Connections to Postgres, and whether its schema fits this code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg

from outbox.errors import DatabaseNewer, NotMigrated, NotReady

HEAD = "0004"
"""The newest migration that this code knows. Checked against `alembic/versions` by a test."""


_SESSION = """
select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') in ('off', 'local');
select set_config(name, value, false)
  from (values ('enable_bitmapscan', 'off'), ('enable_seqscan', 'off'), ('jit', 'off'),
               ('plan_cache_mode', 'force_generic_plan')) as s (name, value)
"""
# The last four: every statement here has an index made for it, and the statistics of a table that only grows are
# always late. With a default of one row expected, Postgres reads and sorts the whole batch for each page (measured:
# six times slower on a batch of 100,000), and plans anew over all partitions each time.


def connect(url: str, *, name: str, check: bool = True) -> psycopg.Connection[Any]:
    """A connection in autocommit mode, for workers and commands.

    `name` shows up in pg_stat_activity. Dead peers are noticed within half a minute. Commits wait for the
    disk even where the server's default says otherwise: what a worker has recorded must not be forgotten.
    Raises `NotReady` with what to do when the server can't be reached, or the schema doesn't fit.
    """
    try:
        conn = psycopg.connect(
            url,
            autocommit=True,
            application_name=f"outbox {name}",
            connect_timeout=10,
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
        conn.execute(_SESSION)
        if check:
            check_schema(conn)
    except BaseException:
        conn.close()
        raise
    return conn


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
