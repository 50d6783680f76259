"""`outbox migrate`: bring the database's schema up to date."""

from __future__ import annotations

import argparse

from outbox import database
from outbox.settings import Settings

HELP = "bring the database's outbox schema up to date"


def configure(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sql", action="store_true", help="print the SQL instead of running it")
    how.add_argument("--check", action="store_true", help="only say whether it is up to date; exit 1 if not")


def run(args: argparse.Namespace) -> int:
    if args.sql:
        from outbox import migrate  # noqa: PLC0415 - alembic is slow to import

        print(migrate.script(), end="")
        return 0
    url = Settings.load(args.state, role="admin").database
    if args.check:
        database.connect(url, name="migrate").close()
        print(f"The database is up to date (migration {database.HEAD}).")
        return 0
    from outbox import migrate  # noqa: PLC0415 - alembic is slow to import

    before, after = migrate.upgrade(url)
    print(f"The database was up to date (migration {after})." if before == after else f"Migrated to {after}.")
    return 0
