"""Processes of an embedded stack whose supervisord was killed, or doesn't answer any more.

Called by `workers.stack`, under its lock. Every process of a stack carries `OUTBOX_STACK=<state directory>`
in its environment, which the kernel shows in /proc: so those of this stack are found, and no others, however
they lost their parent. Where there is no /proc none are found, and the operator has to end them.

Nothing is killed by a pid read from a file alone: after a crash of the machine it may be anybody's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outbox.errors import NotReady

MARK = "OUTBOX_STACK"

_PROC = Path("/proc")


@contextmanager
def marking(state: Path) -> Iterator[None]:
    """What is started in here carries the mark: also an initdb that outlives an `up` is found by the next."""
    before = os.environ.get(MARK)
    os.environ[MARK] = str(state)
    try:
        yield
    finally:
        del os.environ[MARK]
        if before is not None:
            os.environ[MARK] = before


def orphans(state: Path) -> list[int]:
    """The processes of this state directory's stack. Postgres's are left to its own postmaster."""
    return [pid for pid, program in _marked(state) if program != "postgres"]


def _marked(state: Path) -> Iterator[tuple[int, str]]:
    mark = os.fsencode(f"{MARK}={state}")
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # Ended meanwhile, or another user's: not ours.
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name), (entry / "exe").readlink().name


def end(state: Path, *, patience: float = 35.0) -> bool:
    """End them: SIGTERM, and SIGKILL for what is still there after `patience` seconds. → whether there were any.

    Raises `NotReady` if one survives that (it hangs in the kernel).
    """
    found = orphans(state)
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        left = _signalled(state, number, seconds)
        if not left:
            return bool(found)
    raise NotReady(f"process {left[0]} of {state} can't be ended: look what it waits for, then run `outbox down` again")


def _signalled(state: Path, number: signal.Signals, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    told: set[int] = set()
    while left := orphans(state):
        # Again for those that appeared since: a supervisord starts programs until it gets the signal.
        for pid in set(left) - told:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        told.update(left)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def settled(state: Path) -> bool:
    """Whether nothing of the stack runs any more, Postgres included (an initdb's child may need a moment)."""
    return not any(True for _ in _marked(state))
