"""A quiet moment: readers of the index that are overtaken by commits again and again ask its writers to wait.

Xapian keeps what a reader is reading through one later commit, and then raises DatabaseModifiedError. A query that
takes longer than two commits would never come to its end. So a reader that was overtaken holds a shared lock
(`flock`) on the folder of each shard while it tries again, and a writer takes the exclusive one for its commit.

Neither waits for ever: a reader goes on without the lock, and a writer commits without it, when `PATIENCE` is over.
After that a writer doesn't wait any more until it has had the lock again, so that a reader which hangs costs it
the time once. The kernel takes the lock from who dies. Where a file system knows no locks, nobody waits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PATIENCE = 2.0
"""Seconds that a reader or a writer waits for the other. Longer than all but the worst queries take."""

_LOOK_EVERY = 0.002


@contextmanager
def reading(folders: Iterable[Path]) -> Iterator[None]:
    """Inside, writers of these shards commit nothing, as far as their patience reaches."""
    deadline = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        for path in folders:
            with suppress(OSError):
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, folder)
                _lock(folder, fcntl.LOCK_SH, deadline)
        yield


class Writing:
    """A writer's side, for one shard. Not thread-safe."""

    def __init__(self) -> None:
        self._patience = PATIENCE

    @contextmanager
    def commit(self, folder: int) -> Iterator[None]:
        """Inside, no reader that has asked for quiet is at work; or it has had its time."""
        had = False
        try:
            with suppress(OSError):
                had = _lock(folder, fcntl.LOCK_EX, time.monotonic() + self._patience)
            self._patience = PATIENCE if had else 0.0
            yield
        finally:
            if had:
                fcntl.flock(folder, fcntl.LOCK_UN)


def _lock(folder: int, kind: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(folder, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_EVERY)
        else:
            return True
