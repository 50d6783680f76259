"""`python -m tests.robustness`: a run by hand."""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.robustness.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description="Traffic, faults, and a check.")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="the same faults and operations (default: random)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to inject faults (default: 60)")
    parser.add_argument("--runs", type=int, default=1, help="so many runs; the later ones with derived seeds")
    parser.add_argument("--keep", action="store_true", help="keep the state directory (under /tmp/ob-…)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, one JSON object a line")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    kept = True
    for turn in range(args.runs):
        if stop.is_set():
            break
        seed = args.seed if turn == 0 else f"{args.seed}-{turn}"
        print(f"seed {seed}", file=sys.stderr)
        with _progress() as progress:
            bar = progress.add_task("starting", total=None)
            report = run(
                seed, args.seconds, keep=args.keep, stop=stop,
                done=lambda what, n, of: progress.update(bar, description=what, completed=n, total=of or None),  # noqa: B023
            )  # fmt: skip
        print(report.text())
        kept = kept and report.kept
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(report.json()) + "\n")
    return 0 if kept else 1


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
