"""Brings a database's outbox schema up to date, with alembic.

Our migrations live apart from the application's: own script folder, own version table in the schema
`outbox`. An advisory lock lets only one migration run at a time; the others wait, and find nothing to do.
Each run is one transaction: a migration that is killed leaves the schema as it was.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.pool import NullPool

from outbox.database import Unreachable, is_pooled, migrations, reason
from outbox.errors import DatabaseNewer, NotReady

_LOCK = 0x6F7574626F78  # "outbox"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
    return config


def upgrade(url: str) -> tuple[str | None, str | None]:
    """Migrate the database to the newest version. → the revision before and after.

    Raises `NotReady` when the user lacks the rights or is behind a pooler, `DatabaseNewer` when the database is ahead
    of this code.
    """
    engine = sa.create_engine("postgresql+psycopg://" + url.split("://", 1)[1], poolclass=NullPool)
    try:
        with engine.connect() as conn:
            if is_pooled(cast("psycopg.Connection[Any]", conn.connection.driver_connection)):
                raise NotReady(
                    "`outbox migrate` needs a session of its own, and there is a pooler before the database: "
                    "set OUTBOX_DATABASE to a URL that goes past it"
                )
            conn.exec_driver_sql(f"select pg_advisory_lock({_LOCK})")
            conn.commit()
            try:
                before = _revision(conn)
                conn.commit()
                config = _config()
                config.attributes["connection"] = conn
                command.upgrade(config, "head")
                conn.commit()
                after = _revision(conn)
                conn.commit()
            finally:
                if not conn.invalidated:
                    conn.rollback()
                    conn.exec_driver_sql(f"select pg_advisory_unlock({_LOCK})")
                    conn.commit()
    except CommandError as error:
        raise DatabaseNewer(
            f"the database is at a migration that this version of outbox doesn't know ({error}): "
            "upgrade the outbox package"
        ) from error
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise NotReady(
                f"the database user may not do this ({reason(error.orig)}): run `outbox migrate` as the owner of the "
                "database with CREATEROLE, or have an administrator run the output of `outbox migrate --sql`"
            ) from error
        if isinstance(error.orig, psycopg.OperationalError):
            raise Unreachable(f"the database can't be reached ({reason(error.orig)}): is it running?") from error
        raise
    finally:
        engine.dispose()
    return before, after


def _revision(conn: sa.Connection) -> str | None:
    if not conn.exec_driver_sql("select to_regclass('outbox.alembic_version') is not null").scalar():
        return None
    return conn.exec_driver_sql("select version_num from outbox.alembic_version").scalar()


def script() -> str:
    """The whole migration as SQL, for an administrator to read and run with psql."""
    config = _config()
    out = StringIO()
    config.output_buffer = out
    config.set_main_option("sqlalchemy.url", "postgresql://")
    with redirect_stdout(out):
        command.upgrade(config, "head", sql=True)
    return out.getvalue()
