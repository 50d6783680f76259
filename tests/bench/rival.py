"""Rivals: installed on demand into `.venv-bench`, and run as processes of their own on the same server.

They are no dependencies of ours, not even of development. What is installed is in `tests/bench/rivals.lock`, each file
with its hash; `make lock` resolves it anew.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.site import ROOT, Site

VENV = ROOT / ".venv-bench"

LOCK = Path(__file__).with_name("rivals.lock")

COUNT = 400
"""Workflows of a turn."""

WAYS = ("start {} 4", "start {} 8", "start {} 16", "queue {} 40")
"""Direct starts with so many threads, and a queue with so many workers. The best of them is DBOS's rate."""

PATIENCE = 120.0
"""Seconds for the process to end."""


class NotInstalled(Exception):
    """A rival can't be had here; the text says why."""


class Workflows:
    """A process of DBOS that does what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.way = max(WAYS, key=self._measure)

    def _measure(self, way: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(way.format(COUNT), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of DBOS ended: see what it said above")
        return COUNT / float(line)

    def rate(self) -> float:
        """Workflows per second, in the way that was best."""
        return self._measure(self.way)


@contextmanager
def workflows(site: Site) -> Iterator[Workflows]:
    """DBOS in a database of its own. Raises `NotInstalled`."""
    install()
    with subprocess.Popen(
        [VENV / "bin" / "python", Path(__file__).with_name("workflows.py"), site.server.url(database=site.empty())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the process of DBOS did not start: see what it said above")
            made = Workflows(process)
            print(f"DBOS is best at: {made.way.format(COUNT)}", file=sys.stderr)
            yield made
            assert process.stdin is not None
            process.stdin.close()
            process.wait(PATIENCE)
        finally:
            process.kill()


def queue(site: Site, name: str, count: int, *numbers: int) -> float:
    """Have a queue in a database of its own work jobs off (`tests.bench.queues`). → jobs per second."""
    install()
    done = subprocess.run(
        [VENV / "bin" / "python", Path(__file__).with_name("queues.py"), name,
         site.server.url(database=site.empty()), *map(str, (count, *numbers))],
        check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE,
    )  # fmt: skip
    return float(done.stdout)


def install() -> None:
    """Everything that the lock names, and nothing else. A directory that was finished is left as it is.

    Raises `NotInstalled`.
    """
    lock = LOCK.read_bytes()
    ready = VENV / ".ready"
    if ready.is_file() and ready.read_bytes() == lock:
        return
    print(f"installing rivals into {VENV.name} (once)", file=sys.stderr)
    try:
        venv.create(VENV, clear=True, with_pip=True)
        subprocess.run(
            [VENV / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
             "--require-hashes", "--only-binary", ":all:", "-r", LOCK],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, OSError) as error:
        raise NotInstalled(f"they can't be installed ({type(error).__name__}): is there a package index?") from error
    ready.write_bytes(lock)
