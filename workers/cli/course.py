"""The course of a long command: its plan, the question, progress, and how it is taken up again.

Used by the commands that are operations (`outbox.operation`): `replay`, `scrub --repair`, `resilver`. All of them

* print a plan first, on stderr, and ask; `--yes` answers, `--dry-run` ends there;
* show a bar with what is left and how long it takes, where a person is watching;
* keep to `--rate`;
* can be stopped at any time, by Ctrl-C or SIGTERM, and go on with `--resume ID`, or when the same is asked for again.

Exit status: 0 done, 1 not done (not agreed to, or the reason is on stderr), 2 wrong usage, 130 stopped.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from outbox import operation
from outbox.cli.word import identity
from outbox.errors import NotReady, OutboxError
from outbox.lane import is_gone
from outbox.operation import Operation

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([kMG]?)(?:/s)?")
_SIZES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def configure(parser: argparse.ArgumentParser, *, of: str = "intents") -> None:
    """The options that all of these commands have; `of` is what `--rate` counts."""
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and do nothing")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--rate", metavar="N/s", type=rate, help=f"at most so many {of} a second, such as 500 or 2k/s")
    parser.add_argument("--resume", metavar="ID", type=identity, help="go on with this operation")
    parser.add_argument("--json", action="store_true", help="print JSON")


def rate(text: str) -> float:
    """`500`, `500/s`, `2k/s`, `50M/s` as a number a second; for argparse's `type`."""
    match = _RATE.fullmatch(text.strip())
    value = float(match[1]) * _SIZES[match[2]] if match else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: write it like 500, 500/s or 2k/s")
    return value


def agreed(plan: str, question: str, *, yes: bool) -> bool:
    """Print the plan, and ask. Where nobody can be asked, nothing is agreed to without `--yes`."""
    if plan:
        print(plan, file=sys.stderr)
    if yes:
        return True
    if not sys.stdin.isatty():
        print("Nothing was done: add --yes to do it.", file=sys.stderr)
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("Nothing was done.", file=sys.stderr)
    return False


def take_up(
    conn: psycopg.Connection[Any], kind: str, *, number: int | None = None, request: dict[str, Any] | None = None
) -> Operation | None:
    """The operation `number` (`--resume`), or else one that was asked for with the same `request` and never ended.

    None: there is none, so it is a new one. Raises `NotReady` when `number` can't be taken up.
    """
    if number is None:
        for row in reversed(operation.find(conn, kind=kind, state="running")):
            # A process that was killed holds its lease for a while yet; on this machine one can see that it is gone.
            if row["request"] == request and not (row["runs"] and not is_gone(row["place"])):
                print(
                    f"{kind} {row['id']} of {row['started_at']:%Y-%m-%d %H:%M} was asked for the same and has not "
                    f"ended: it goes on (to begin anew: outbox operations abandon {row['id']}).",
                    file=sys.stderr,
                )
                return operation.resume(conn, row["id"])
        return None
    for row in operation.find(conn, number=number):
        if row["kind"] != kind:
            raise NotReady(f"operation {number} is a {row['kind']}: run outbox {row['kind']} --resume {number}")
    return operation.resume(conn, number)


@contextmanager
def under_way(conn: psycopg.Connection[Any], course: Operation) -> Iterator[None]:
    """Inside, the operation is worked on. Whatever stops it, it can be taken up again; the caller ends it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BaseException:
        # If this doesn't get through, the lease runs out; the one who resumes sees that this process is gone.
        with suppress(psycopg.Error, OutboxError):
            course.end(conn, "running")
        what = f"resilver {course.request['target']}" if course.kind == "resilver" else course.kind
        print(f"Not finished; go on with: outbox {what} --resume {course.id}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class Pace:
    """Keeps to a rate, counted from when it was made."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next = time.monotonic()

    def keep(self, count: float) -> None:
        """After `count` more were done: sleep until that is not too fast."""
        if self._rate is None:
            return
        # What was missed while waiting for something else is not caught up.
        self._next = max(self._next, time.monotonic() - 1.0) + count / self._rate
        time.sleep(max(0.0, self._next - time.monotonic()))


class Bar:
    """A bar on stderr, where that is a terminal; silent elsewhere. Used as a context."""

    def __init__(self, what: str, total: float | None, done: int = 0) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(what, total=total)
        self._progress.update(self._task, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: float) -> None:
        """So much more is done."""
        self._progress.advance(self._task, count)

    def at(self, done: float, total: float | None = None) -> None:
        """So much is done altogether; `total` when more is known of that."""
        if total is None:
            self._progress.update(self._task, completed=done)
        else:
            self._progress.update(self._task, completed=done, total=total)

    def say(self, what: str) -> None:
        """What it is doing, such as waiting for something."""
        self._progress.update(self._task, description=what)
