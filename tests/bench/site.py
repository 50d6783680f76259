"""The site of a benchmark: a temporary directory, and in it a Postgres of its own with production's settings.

Nothing is traded for speed: fsync and synchronous_commit are on, because what is measured against them has to pay
for them too. The server starts when a benchmark first asks for a database, and goes with the directory.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psycopg

from outbox import migrate
from workers.postgres import Postgres

ROOT = Path(__file__).resolve().parents[2]
"""Where `tests` is imported from, for child processes."""

_TEMPLATE = "template_outbox"


class Site:
    """Files and databases for benchmarks."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._number = itertools.count()
        self._started: Postgres | None = None

    @cached_property
    def server(self) -> Postgres:
        """The running server, with a migrated database to copy from."""
        postgres = Postgres(self.home / "pg", self.home / "run")
        postgres.init()
        self._started = postgres
        postgres.start()
        postgres.provide()
        self._create(postgres, "owner app", _TEMPLATE)
        migrate.upgrade(postgres.url(database=_TEMPLATE))
        return postgres

    @staticmethod
    def _create(postgres: Postgres, how: str, name: str) -> None:
        with psycopg.connect(postgres.url(), autocommit=True) as conn:
            conn.execute(f"create database {name} {how}")

    def database(self) -> str:
        """The name of a fresh, migrated database."""
        name = f"bench_{next(self._number)}"
        self._create(self.server, f"template {_TEMPLATE} owner app", name)
        return name

    def empty(self) -> str:
        """The name of a fresh database without anything of ours."""
        name = f"bench_{next(self._number)}"
        self._create(self.server, "", name)
        return name

    def folder(self) -> Path:
        """A path for files, where nothing is yet."""
        return self.home / f"files_{next(self._number)}"

    def environment(self) -> str:
        """One line about the machine, without which no number means anything."""
        version = "not started"
        if self._started is not None:
            with psycopg.connect(self._started.url()) as conn:
                row = conn.execute("show server_version").fetchone()
                version = "" if row is None else str(row[0])
        load = " ".join(f"{value:.2f}" for value in os.getloadavg())
        return f"python {platform.python_version()}, Postgres {version}, {os.cpu_count()} cores, load average {load}"

    def close(self) -> None:
        """Stop the server."""
        if self._started is not None and self._started.pid() is not None:
            self._started.stop("immediate")


@contextmanager
def site() -> Iterator[Site]:
    """A site that leaves nothing behind."""
    # Short, for the server's socket; and the server runs as a user of its own, who has to get in.
    home = Path(tempfile.mkdtemp(prefix="obb-"))
    home.chmod(0o755)
    made = Site(home)
    try:
        yield made
    finally:
        try:
            made.close()
        finally:
            shutil.rmtree(home, ignore_errors=True)
