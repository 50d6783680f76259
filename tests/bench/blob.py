"""`blob`, `blob-memory`: staging and publishing a large file.

`blob` holds it against the least that anybody must do who wants to know a file's hash and be sure of it: sha256, write
and fsync of the same bytes on the same file system. `blob-memory` is how much a process grows that stages and
publishes 1 GiB.

Run as a program (`python -m tests.bench.blob DIRECTORY BYTES`) it is the process whose memory is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from outbox.blob import BlobStore
from outbox.intent import Intent
from outbox.participant import APPLIED, LaneView
from outbox.source import CHUNK
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.site import ROOT, Site
from workers.blob import BlobParticipant

SIZE = 50_000_000
LARGE = 2**30
_MIB = 2**20
_LOG = "0" * 16


class Store:
    """A store in use, whose 256 folders are there already."""

    def __init__(self, directory: Path) -> None:
        self.store = BlobStore(directory)
        self.store.make()
        for number in range(256):
            (directory / "objects" / f"{number:02x}").mkdir(exist_ok=True)
        self._participant = BlobParticipant(self.store)
        self._participant.open(LaneView("blob", 0, 1, unclean=False))
        self._numbers = count(1)

    def publish(self, source: memoryview | Path) -> str:
        """Stage, apply, settle: all that application and worker do. → the digest."""
        number = next(self._numbers)
        staged = self.store.stage(source, xid=number, log=_LOG)
        intent = Intent(number, "blob", "put", staged.digest, json.dumps(staged.payload()))
        outcomes = self._participant.apply([intent], None)
        if outcomes != [APPLIED]:
            raise RuntimeError(f"the blob was not published: {outcomes[0].error}")
        self._participant.settle([intent])
        return staged.digest

    def close(self) -> None:
        """Let go of the files."""
        self._participant.close()


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Bytes a second."""
    folder = site.folder()
    store = Store(folder)
    data = bytearray(os.urandom(SIZE))
    view = memoryview(data)

    def published() -> float:
        data[:16] = os.urandom(16)
        start = time.perf_counter()
        digest = store.publish(view)
        took = time.perf_counter() - start
        store.store.path(digest).unlink()
        return SIZE / 1e6 / took

    def bare() -> float:
        path = folder / "bare"
        start = time.perf_counter()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        sha = hashlib.sha256()
        for first in range(0, SIZE, CHUNK):
            chunk = view[first : first + CHUNK]
            sha.update(chunk)
            os.write(file, chunk)
        os.fsync(file)
        os.close(file)
        sha.hexdigest()
        took = time.perf_counter() - start
        path.unlink()
        return SIZE / 1e6 / took

    pair = compare(published, bare, pairs=5 if quick else 15)
    store.close()
    shutil.rmtree(folder)
    yield Figure("blob.ratio", pair.ratio, "ratio of MB/s", Bar(">=", 0.9))
    yield Figure("blob.published", pair.ours, "MB/s")
    yield Figure("blob.bare", pair.theirs, "MB/s")


def memory(site: Site, *, quick: bool) -> Iterator[Figure]:
    """How much a process grows by."""
    folder = site.folder()
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.blob", str(folder), str(LARGE)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    shutil.rmtree(folder)
    grown, before = map(int, done.stdout.split())
    yield Figure("blob-memory.growth", grown / _MIB, "MiB", Bar("<", 64))
    yield Figure("blob-memory.before", before / _MIB, "MiB")


def _status(name: str) -> int:
    """Bytes that /proc/self/status says. Not getrusage, whose peak is inherited from the process that started this."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def main(directory: Path, size: int) -> None:
    """Publish a file with a hole of `size` bytes, and say what that took of memory and what there was before."""
    store = Store(directory)
    source = directory / "source"
    with source.open("wb") as file:
        file.truncate(size)
    before = _status("VmRSS")
    store.publish(source)
    print(_status("VmHWM") - before, before)
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
