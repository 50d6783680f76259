"""The Maildir that the embedded mail server writes into.

Used by `workers.mailserver`; `workers.evidence` reads it. What `store` has returned for survives a power cut:
the file is synced before it gets its name in new, and new after.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from outbox.errors import NotReady
from outbox.failpoint import hit


class Maildir:
    """The Maildir, made if need be, and owned by this process while it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for folder in (path, path / "tmp", path / "new", path / "cur"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # With two servers, a session at one of them wouldn't end the session at the other.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise NotReady(f"another mail server uses {path}: stop it, or give --maildir another directory") from None
        for left in (path / "tmp").iterdir():
            left.unlink()
        self._new = os.open(path / "new", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # A server that was killed may have renamed without fsync: what is seen from now on must stay.
        for folder in (path.parent, path):
            _sync(folder)
        os.fsync(self._new)

    def store(self, header: bytes, content: bytes) -> str:
        """Keep a message for good. → its queue id. Raises `OSError` if it isn't kept."""
        queue_id = uuid.uuid4().hex
        name = f"{int(time.time())}.{queue_id}.outbox"
        temporary, final = self.path / "tmp" / name, self.path / "new" / name
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(header)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            hit("maildir.written")
            os.rename(temporary, final)
            hit("maildir.renamed")
            os.fsync(self._new)
        except OSError:
            # Never fsync again after it failed: the pages are marked clean by now.
            for path in (temporary, final):
                with suppress(OSError):
                    path.unlink()
            raise
        hit("maildir.stored")
        return queue_id

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._new)
        os.close(self._lock)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
