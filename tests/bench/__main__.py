"""`python -m tests.bench [NAME …] [--json] [--quick]`: measure, and hold the figures against their bars.

Ratios are what counts: both sides are measured in the same run, in turns. Still, a machine that is busy with something
else makes them less sure; the load average is printed with them.

`--json` prints one object, figure → {"value", "unit", "bar", "ok"}, and everything else goes to stderr. `--quick` takes
fewer turns, and without names leaves out those that take longest.

A benchmark that fails is named at the end, after the figures of the others.

Exit status: 0 all bars met, 1 a bar missed or a benchmark failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

from tests.bench import (
    actor,
    actor_latency,
    actor_paths,
    blob,
    index,
    latency,
    log,
    mail,
    orm,
    resilver,
    retention,
    saga,
    saga_latency,
    scrub,
)
from tests.bench.figure import Figure, as_json, as_table
from tests.bench.site import Site, site


class Benchmark(Protocol):
    """Measures, and yields its figures."""

    __doc__: str | None

    def __call__(self, site: Site, *, quick: bool) -> Iterator[Figure]: ...


#: In the order in which they run.
BENCHMARKS: dict[str, Benchmark] = {
    "orm": orm.measure,
    "log-1e5": log.small,
    "log-1e6": log.large,
    "log-held": log.held,
    "index": index.measure,
    "resilver": resilver.measure,
    "blob": blob.measure,
    "blob-memory": blob.memory,
    "scrub": scrub.measure,
    "latency": latency.measure,
    "saga": saga.measure,
    "saga-latency": saga_latency.measure,
    "saga-kept": saga.kept,
    "actor": actor.measure,
    "actor-held": actor.held,
    "actor-latency": actor_latency.measure,
    "actor-queues": actor_latency.queues,
    "actor-send": actor_paths.send,
    "actor-retry": actor_paths.retry,
    "actor-due": actor_paths.due,
    "mail": mail.measure,
    "retention": retention.measure,
}

LONG = frozenset({"log-1e6", "resilver", "saga-kept"})
"""Left out of `--quick` unless they are named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for. → the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure against the bars.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object of figures")
    parser.add_argument("--quick", action="store_true", help=f"fewer turns; without {', '.join(LONG)} unless named")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    names = args.names or [name for name in BENCHMARKS if not (args.quick and name in LONG)]
    # What is left behind otherwise is a server and its files.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with site() as made:
            failed: list[str] = []
            figures = list(_run(made, names, failed, quick=args.quick))
            environment = made.environment()
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        return 130
    print(environment, file=sys.stderr if args.json else sys.stdout)
    print(as_json(figures) if args.json else as_table(figures))
    return _judge(figures, failed)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(made: Site, names: Sequence[str], failed: list[str], *, quick: bool) -> Iterator[Figure]:
    for name in dict.fromkeys(names):
        start = time.monotonic()
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            yield from BENCHMARKS[name](made, quick=quick)
        except Exception:  # noqa: BLE001 - minutes of figures are not to be lost with it
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _judge(figures: Sequence[Figure], failed: Sequence[str]) -> int:
    missed = [figure for figure in figures if figure.ok is False]
    for figure in missed:
        print(f"bar missed: {figure}, must be {figure.bar}", file=sys.stderr)
    for name in failed:
        print(f"benchmark failed: {name}, see above", file=sys.stderr)
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
