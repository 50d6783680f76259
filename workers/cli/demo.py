"""`outbox demo`: write a folder of real files while workers are killed, and check that nothing is lost or half done."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from outbox import Token, status
from outbox.database import Unreachable, connect
from outbox.errors import NotReady, OutboxError
from outbox.settings import Settings
from workers.demo import publish
from workers.demo.check import check
from workers.demo.nemesis import Nemesis
from workers.demo.report import Report
from workers.demo.traffic import Traffic, files
from workers.stack import Stack

HELP = "write real files through the outbox while workers are killed, and check that nothing is lost"

COUNT = 1500
"""Files by default: less than half a minute on two cores."""

KILL_WHILE_DRAINING = 5.0
"""Seconds that the killing goes on after the last commit."""

DRAIN_LIMIT = 300.0
"""Seconds after the last kill within which everything must have drained (I10)."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="folder (default: Python's library)")
    parser.add_argument("--count", type=_count, default=COUNT, metavar="N", help=f"at most N files (default {COUNT})")
    parser.add_argument(
        "--kill-every", type=_seconds, default=1.0, metavar="SECONDS", help="0: kill nothing (default 1)"
    )
    parser.add_argument(
        "--bounce-postgres", action=argparse.BooleanOptionalAction, default=True, help="crash Postgres once (default)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the state directory, to look around in")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of files: use 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: use 0 (never) to 3600")
    return number


def run(args: argparse.Namespace) -> int:
    root = (args.path or Path(sysconfig.get_path("stdlib"))).absolute()
    if not root.is_dir():
        raise NotReady(f"{root} is not a folder: name one with files in it")
    chosen = files(root, args.count)
    if not chosen:
        raise NotReady(f"{root} has no files that can be read: name a folder with files in it")
    own = not args.state
    state = Path(args.state or tempfile.mkdtemp(prefix="outbox-demo-"))
    # Nothing of what the shell says of other servers: their rows, documents and mails are not for playing with.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    stack = Stack(state, ours | {"OUTBOX_SAGAS": publish.MODULE})
    if not own and stack.directory.used():
        raise NotReady(f"{state} is in use: the demonstration needs a state directory of its own, that isn't there yet")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        report, skipped = _demonstrate(args, stack, root, chosen)
    finally:
        signal.signal(signal.SIGTERM, previous)
        stack.down()
        if not args.keep:
            shutil.rmtree(state, ignore_errors=True)
    if skipped:
        print(f"{skipped} files could not be read and were left out", file=sys.stderr)
    print(json.dumps(report.json()) if args.json else report.text())
    if args.keep:
        print(f"kept: {state} (outbox search --state {state} WORDS)", file=sys.stderr)
    return 0 if report.kept else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _demonstrate(args: argparse.Namespace, stack: Stack, root: Path, chosen: list[Path]) -> tuple[Report, int]:
    began = time.monotonic()
    with _progress() as progress:
        bar = progress.add_task("starting Postgres, mail server, workers", total=None)
        stack.up(lambda line: progress.update(bar, description=line))
        settings = Settings.load(stack.state, role="app", env={})
        traffic = Traffic(settings, root, chosen)
        nemesis = Nemesis(stack, args.kill_every)
        nemesis.start()
        try:
            _write(args, progress, bar, traffic, nemesis)
            _drain(stack, progress, bar, nemesis, traffic.expected.last)
        finally:
            nemesis.stop()
            traffic.engine.dispose()
        progress.update(bar, description="checking the participants", total=None)
        report = Report(kills=nemesis.kills)
        check(settings, stack.state / "mail", traffic.expected, report)
    report.seconds = time.monotonic() - began
    return report, traffic.expected.skipped


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip


def _write(args: argparse.Namespace, progress: Progress, bar: object, traffic: Traffic, nemesis: Nemesis) -> None:
    """The application writes in a thread of its own, so that Ctrl-C finds us here."""
    progress.update(bar, description="writing, while workers are killed", total=len(traffic.chosen), completed=0)  # type: ignore[arg-type]
    written = 0
    stop = threading.Event()
    failed: list[BaseException] = []

    def done() -> None:
        nonlocal written
        written += 1
        progress.update(bar, completed=written)  # type: ignore[arg-type]

    def write() -> None:
        try:
            traffic.run(done, stop.is_set)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    writer = threading.Thread(target=write, name="traffic", daemon=True)
    writer.start()
    bounced = not args.bounce_postgres
    try:
        while writer.is_alive():
            writer.join(timeout=0.05)
            if not bounced and written >= len(traffic.chosen) // 2:
                bounced = True
                nemesis.bounce_postgres()
    finally:
        stop.set()
        writer.join()
    if failed:
        raise failed[0]
    if not bounced:
        nemesis.bounce_postgres()


def _drain(stack: Stack, progress: Progress, bar: object, nemesis: Nemesis, last: Token | None) -> None:
    """Wait until all lanes are idle and all sagas have ended; the killing goes on for a while."""
    settings = Settings.load(stack.state, role="worker", env={})
    began = time.monotonic()
    behind_most = 1
    while True:
        if time.monotonic() - began > KILL_WHILE_DRAINING:
            nemesis.stop()
        behind = _behind(settings, last)
        if behind == 0:
            return
        if behind is not None:
            behind_most = max(behind_most, behind)
            progress.update(bar, description="draining", total=behind_most, completed=behind_most - behind)  # type: ignore[arg-type]
        if time.monotonic() - began > DRAIN_LIMIT:
            raise OutboxError(
                f"the lanes did not drain within {DRAIN_LIMIT:.0f} s: see `outbox status --state {stack.state}`"
            )
        time.sleep(0.1)


def _behind(settings: Settings, last: Token | None) -> int | None:
    """Intents neither applied nor parked for an operator, and sagas under way; None while the database is away."""
    try:
        with connect(settings.database, name="demo") as conn:
            picture = status.read(conn)
            # The counts are of what the newest tick shows: that must include the last commit.
            reached = last is None or conn.execute(
                "select bool_and(outbox.reached(%s::text::xid8, target, %s)) from unnest(%s::text[]) target",
                (last.xid, last.id, ["index", "blob", "mail", "saga"]),
            ).fetchone() == (True,)
            # One that is stuck waits for an operator; the check will see it.
            row = conn.execute(
                "select count(*) from outbox.saga where state not in ('completed', 'compensated', 'stuck')"
            ).fetchone()
            sagas = row[0] if row else 0
    except (Unreachable, psycopg.OperationalError):
        return None
    unseen = max(0, picture.log["last_id"] - picture.log["high"])
    waiting = sum(parked["count"] for parked in picture.parked if parked["reason"] in ("retry", "blocked"))
    return int((not reached) + unseen + waiting + sagas + sum(lane["behind"] for lane in picture.lanes))
