"""The embedded stack: Postgres, a mail server and the workers, in one state directory, under supervisord.

Called by `outbox up`, `outbox down` and `outbox demo`; `workers.statedir` tells what is in the directory.

When `up` returns, the schema is migrated, every program runs, and all of the above is on disk. It can be
interrupted or killed anywhere: the next `up` goes on from there. When `down` returns, no process is left.

Errors: `StateVersion` for another format; `NotReady` for everything else that is in the way, with what to do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from outbox import migrate
from outbox.errors import NotReady
from workers import orphan, supervisor
from workers.postgres import DATABASE, Postgres, sockets_for
from workers.statedir import Say, StateDirectory, until
from workers.supervisor import CONTROL_SOCKET, MAIL_SOCKET, SERVERS, State, Supervisor

_NOT_PASSED_ON = ("OUTBOX_DATABASE", "OUTBOX_SAGA_DATABASE", "OUTBOX_ACTOR_DATABASE", "PYTHONWARNINGS")

_START = 60.0
_DRAIN = 40.0  # more than the workers' stopwaitsecs
_END = 120.0  # more than Postgres's stopwaitsecs, with the mail server's


@dataclass(frozen=True, slots=True)
class Info:
    """Where everything of a stack is, and what runs."""

    state: Path
    running: bool
    #: URL for the application.
    database: str
    index: Path
    blobs: Path
    #: Maildir with all mail that was "sent".
    mail: Path
    smtp: str
    logs: Path
    programs: dict[str, State]


def _silent(_line: str) -> None:
    pass


class Stack:
    """The embedded stack of one state directory."""

    def __init__(self, state: str | Path, environment: Mapping[str, str] = os.environ) -> None:
        """`environment` is what supervisord and its programs get, but for the database: that is the stack's own."""
        # The real path: the stack of a directory is one, under whatever name.
        self.state = Path(os.path.realpath(state))
        self.sockets = sockets_for(self.state)
        self.directory = StateDirectory(self.state)
        self.environment = environment
        self.supervisor = Supervisor(self.sockets / CONTROL_SOCKET)

    @cached_property
    def postgres(self) -> Postgres:
        """The stack's server. Raises `NotReady` if the embedded Postgres isn't installed."""
        return Postgres(self.state / "pg", self.sockets)

    def up(self, say: Say = _silent) -> bool:
        """Start what doesn't run yet, and wait until all of it does. → False if all of it ran already."""
        with self.directory.explained():
            self.directory.check()
            self.directory.make()
            with self.directory.locked(say), orphan.marking(self.state):
                return self._up(say)

    def _up(self, say: Say) -> bool:
        started = False
        if self.supervisor.phase() == "ending":
            say("waiting for a shutdown that was under way")
            until(lambda: self.supervisor.phase() != "ending", _END)
        if self.supervisor.phase() != "running":
            started = True
            if orphan.orphans(self.state) or self.postgres.pid():
                say("ending what a supervisord that was killed left behind")
                self._end_orphans()
            say("preparing Postgres")
            self.directory.fill(self.sockets, self.postgres.user)
            self.directory.note(DATABASE, self.sockets, self._smtp)
            self.postgres.init()
            say("starting supervisord, Postgres and the mail server")
            self._start()
        self._wait_for_postgres()
        say("bringing the schema up to date")
        self.postgres.provide()
        migrate.upgrade(self.postgres.url(database=DATABASE))
        for name, state in self.supervisor.states().items():
            if state.name != "RUNNING":
                started = True
                self.supervisor.start(name)
        say("waiting for the workers")
        self._wait_until_running()
        return started

    def down(self, say: Say = _silent) -> bool:
        """Stop everything: the workers first (they drain), the mail server, then Postgres. → False if nothing ran."""
        with self.directory.explained():
            self.directory.check()
            if not self.directory.used():
                return False
            with self.directory.locked(say):
                phase = self.supervisor.phase()
                if phase == "gone":
                    return self._end_orphans()
                # If supervisord dies under our hands, what it leaves is ended below.
                with suppress(supervisor.Unanswered):
                    if phase == "running":
                        say("stopping the workers")
                        self._stop_workers()
                        say("stopping the mail server and Postgres")
                        self.supervisor.shutdown()
                until(lambda: self.supervisor.phase() == "gone" and not orphan.orphans(self.state), _END)
                self._end_orphans()
                return True

    def pids(self) -> dict[str, int]:
        """Process ids of the programs that run; none if the stack is down."""
        return {name: state.pid for name, state in self._states().items() if state.pid}

    def kill(self, program: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a program a signal, for demonstrations and tests; supervisord starts it again."""
        self.supervisor.signal(program, number)

    def restart_postgres_immediately(self) -> None:
        """Crash Postgres, and wait until supervisord has it back and it has recovered."""
        before = self.pids().get("postgres")
        # What `pg_ctl stop -m immediate` sends. pg_ctl would wait for the pid file to go, and meet the new one.
        self.kill("postgres", signal.SIGQUIT)
        if not until(lambda: self.pids().get("postgres") not in (None, before), _START):
            raise NotReady(f"Postgres was not started again: see {self.state / 'log' / 'postgres.log'}")
        self._wait_for_postgres()

    def info(self) -> Info:
        """Where everything is, and what runs."""
        programs = self._states()
        return Info(
            state=self.state,
            running=bool(programs),
            database=self.postgres.url("app", DATABASE),
            index=self.state / "index",
            blobs=self.state / "blobs",
            mail=self.state / "mail",
            smtp=self._smtp,
            logs=self.state / "log",
            programs=programs,
        )

    @property
    def _smtp(self) -> str:
        return f"unix:{self.sockets / MAIL_SOCKET}"

    def _states(self) -> dict[str, State]:
        try:
            return self.supervisor.states()
        except supervisor.Unanswered:
            return {}

    def _environment(self) -> dict[str, str]:
        # The stack's workers drain the stack's own log, also when the shell points applications elsewhere. A shell that
        # makes warnings errors means its own programs: supervisord would end each connection with one.
        own = {name: value for name, value in self.environment.items() if name not in _NOT_PASSED_ON}
        # supervisord runs in the state directory: what is relative to this one's would be lost.
        absolute = {name: os.path.abspath(own[name]) for name in ("OUTBOX_INDEX", "OUTBOX_BLOBS") if own.get(name)}
        return own | absolute | {"OUTBOX_STATE": str(self.state), "PYTHONUNBUFFERED": "1"}

    def _start(self) -> None:
        if find_spec("supervisor") is None:
            raise NotReady("supervisord is not installed: pip install 'postgres-outbox[embedded]'")
        config = supervisor.embedded(
            self.state,
            self.sockets,
            self.postgres,
            home=Path.cwd(),
            actors=bool(self.environment.get("OUTBOX_ACTORS")),
            relay=bool(self.environment.get("OUTBOX_RELAY")),
        )
        (self.state / "supervisord.conf").write_text(config, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", "supervisord.conf"],
            cwd=self.state,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_START,
        )
        if done.returncode or not until(lambda: self.supervisor.phase() == "running", _START):
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            log = self.state / "log" / "supervisord.log"
            raise NotReady(f"supervisord did not start ({next(iter(said), 'no reason given')}): see {log}")

    def _wait_for_postgres(self) -> None:
        try:
            self.postgres.wait(_START)
        except NotReady as error:
            raise NotReady(f"Postgres did not start ({self._last('postgres')}): see {self._log('postgres')}") from error

    def _wait_until_running(self) -> None:
        def missing() -> list[str]:
            return [name for name, state in self.supervisor.states().items() if state.name != "RUNNING"]

        if not until(lambda: not missing(), _START / 2):
            name = next(iter(missing()), "mail")
            raise NotReady(
                f"the program {name} does not stay up ({self._last(name)}): see {self._log(name)}; the others run, "
                "and `outbox up` can be repeated"
            )

    def _stop_workers(self) -> None:
        def drained() -> bool:
            states = self.supervisor.states()
            names = states.keys() - set(SERVERS)
            still = [name for name in names if states[name].name in ("STARTING", "RUNNING", "BACKOFF")]
            # Again: one that had just died is started once more in spite of the first call.
            for name in still:
                self.supervisor.stop(name)
            return not still and all(states[name].name != "STOPPING" for name in names)

        # Those that don't drain in time are killed by supervisord, which is what the log is for.
        until(drained, _DRAIN)

    def _end_orphans(self) -> bool:
        """What runs without a supervisord that answers. Workers and mail server first: they use Postgres."""
        found = orphan.end(self.state)
        if self.postgres.pid():
            self.postgres.stop("fast")
            found = True
        until(lambda: orphan.settled(self.state), _START)
        for file in (self.state / "supervisord.pid", self.sockets / CONTROL_SOCKET, self.sockets / MAIL_SOCKET):
            file.unlink(missing_ok=True)
        return found

    def _log(self, program: str) -> Path:
        return self.state / "log" / f"{program}.log"

    def _last(self, program: str) -> str:
        try:
            lines = self._log(program).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "no log yet")
