"""The state directory of the embedded stack: what is in it, whose it is, and who is at work in it.

    state.json        what `outbox.settings` reads; its format is checked before anything is touched
    pg/               Postgres's data             index/ blobs/    the participants' stores
    mail/             Maildir of what was sent    log/             one log per program, rotated
    run/              sockets (elsewhere if the path is too long for a socket)
    .lock             held by the `up` or `down` at work
    supervisord.conf, supervisord.pid

Called by `workers.stack`. `note` is durable when it returns, and never leaves half a file.

Errors: `StateVersion` for another format; `NotReady` for a path that isn't a state directory, belongs to
others, or can't be written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from outbox.errors import NotReady
from outbox.settings import STATE_FILE, STATE_FORMAT, read_state

Say = Callable[[str], None]

LOCK_FILE = ".lock"

#: A Maildir needs all three of its own before the first mail.
_FOLDERS = ("index", "blobs", "log", "mail", "mail/tmp", "mail/new", "mail/cur")

_NEEDED = 100 << 20
"""Bytes of a new Postgres with its first WAL segments, rounded up."""

_OTHER = 180.0


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition. → False if it isn't met in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class StateDirectory:
    """One state directory, by its real path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def used(self) -> bool:
        """Whether an `up` has ever begun here."""
        return (self.path / LOCK_FILE).exists()

    def check(self) -> None:
        """That the directory is ours to use. Touches nothing."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise NotReady(f"{self.path} is a file, not a state directory: give another --state")
        if (self.path / STATE_FILE).exists():
            read_state(self.path)
        elif not self.used() and any(self.path.iterdir()):
            raise NotReady(f"{self.path} holds other files and no state: give a new or an empty directory as --state")

    def make(self) -> None:
        """The directory itself, for this user only. As root, `Postgres.init` lets its user pass through."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.used():
            self.path.chmod(0o700)

    def fill(self, sockets: Path, postgres_user: str | None) -> None:
        """The folders in it, and the one for the sockets. Raises `NotReady` if that one is somebody else's."""
        free = shutil.disk_usage(self.path).free
        if free < _NEEDED and not (self.path / "pg").exists():
            # initdb would fail halfway, and clean up, so that nobody could see why.
            raise NotReady(
                f"the disk of {self.path} has {free >> 20} MB free and a new stack needs {_NEEDED >> 20}: free some, "
                "or give another --state"
            )
        for folder in _FOLDERS:
            (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        # In libpq's URLs and Postgres's settings these separate or quote.
        if re.search(r"[\s%&#?,'\"\\]", str(sockets)):
            raise NotReady(f"{sockets} has a character that a database URL can't carry: give another --state")
        sockets.mkdir(mode=0o700, exist_ok=True)
        found = sockets.lstat()
        owners = {os.geteuid()} | {entry.pw_uid for entry in pwd.getpwall() if entry.pw_name == postgres_user}
        # Elsewhere than in the state directory its name can be guessed: another user may have made it.
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077 or found.st_uid not in owners:
            raise NotReady(f"{sockets} is not private to its user: remove it, or give a shorter --state")

    def note(self, database: str, sockets: Path, smtp: str) -> None:
        """Write state.json, whole or not at all."""
        content = {"format": STATE_FORMAT, "database": database, "sockets": str(sockets), "smtp": smtp}
        new = self.path / f"{STATE_FILE}.new"
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / STATE_FILE)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """One `up` or `down` at a time. The kernel drops the lock of one that is killed."""
        lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

        def taken() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            if not taken():
                say("waiting for another `outbox up` or `outbox down` in this directory")
                if not until(taken, _OTHER):
                    raise NotReady(f"another `outbox up` or `outbox down` holds {self.path}: wait for it, or end it")
            yield
        finally:
            os.close(lock)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns the system's errors into what a user can do about them."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotReady(f"the disk of {self.path} is full: free some 100 MB and run it again") from error
            raise NotReady(
                f"{self.path} can't be used ({error.strerror or error}: {error.filename or 'no file'}): "
                "make it writable for this user, or give another --state"
            ) from error
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            raise NotReady(f"a program that the stack needs failed ({said[-1]}): see {self.path / 'log'}") from error
