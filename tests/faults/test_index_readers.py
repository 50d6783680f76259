"""Readers work through any number of commits: no error reaches them, and what they see of a shard is of one commit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.search import Index
from tests.fixtures.site import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import itertools, sys
from pathlib import Path
from outbox.document import document
from outbox.intent import Intent
from outbox.participant import LaneView
from outbox.position import Position
from workers.index import IndexParticipant

directory, lane, commits, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
participant = IndexParticipant(directory)
participant.open(LaneView("index", lane, 1, False, ((0, 8191), (8192, 16383))[lane]))
for n in itertools.count(1):
    if n > commits and stop.exists():
        break
    # Ten documents that always change together, and one more of so many.
    batch = [
        Intent.make("index", "put", f"{lane}/{i}", document(text=f"always generation {n}", data={"generation": n}))
        for i in range(10)
    ] + [Intent.make("index", "put", f"{lane}/more/{n % 2000}", document(text=f"grows {n} " + "words " * 50))]
    participant.apply([i._replace(id=n) for i in batch], Position("a" * 16, n, "b" * 16))
participant.close()
print(n - 1)
"""

READER = """
import json, sys
from pathlib import Path
from outbox.search import Index

last, queries, seen = {0: 0, 1: 0}, 0, 0
with Index(Path(sys.argv[1])) as index:
    for line in iter(sys.stdin.readline, ""):
        for _ in range(20):
            found = index.search("always", limit=100)
            queries += 1
            for lane in (0, 1):
                generations = {h.data["generation"] for h in found.hits if h.key.startswith(f"{lane}/")}
                count = sum(h.key.startswith(f"{lane}/") for h in found.hits)
                assert (count, len(generations)) in ((10, 1), (0, 0)), f"torn: {count} of {generations}"
                newest = max(generations, default=0)
                assert newest >= last[lane], f"went back from {last[lane]} to {newest}"
                seen += newest != last[lane]
                last[lane] = newest
        one = index.get("0/3")
        assert one is None or one.data["generation"] >= last[0]
        print(json.dumps([queries, seen, last[0], last[1]]), flush=True)
"""


@pytest.fixture
def fast() -> Iterator[Path]:
    """In memory if there is room, where commits come as fast as they can."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**28
    place = Path(tempfile.mkdtemp(prefix="ob-", dir=memory if roomy else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def python(code: str, *words: object, pipe: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def read_through(directory: Path, commits: int, seen_too: int) -> None:
    """Two readers beside two writers, until each writer has made, and a reader has seen, so many commits."""
    stop = directory.with_name("stop")
    writers = [python(WRITER, directory, lane, commits, stop, pipe=subprocess.PIPE) for lane in (0, 1)]
    readers: list[subprocess.Popen[str]] = []
    try:
        for lane in (0, 1):
            until((directory / f"0{lane}" / "iamglass").exists, "the shard is made")
        readers = [python(READER, directory, pipe=subprocess.PIPE) for _ in range(2)]
        while True:
            ended = all(writer.poll() is not None for writer in writers)
            for reader in readers:
                assert reader.stdin is not None
                assert reader.stdout is not None
                reader.stdin.write("\n")
                reader.stdin.flush()
                line = reader.stdout.readline()
                assert line, reader.communicate()[1]
                answer = json.loads(line)
                if answer[1] >= seen_too:
                    stop.touch()
            # When nothing is written any more, the newest commit is seen by whoever looks.
            if ended:
                assert answer[2:] == [int(writer.communicate()[0]) for writer in writers]
                return
    finally:
        for process in [*readers, *writers]:
            process.kill()
            if process.stderr and not process.stderr.closed:
                process.communicate()


def test_index_readers_see_whole_commits_and_no_error_while_thousands_are_made(fast: Path) -> None:
    read_through(fast / "index", 2000, 50)


HEAVY = """
import sys
from pathlib import Path
from outbox import search

tries = []
with search.Index(Path(sys.argv[1])) as index:
    refresh = index._refresh
    index._refresh = lambda: (tries.append(1), refresh())
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        # Every document's posting is read, and every snippet is made.
        index.search("words OR always OR grows", limit=3000)
print(len(tries), flush=True)
"""


def test_index_i10_reader_asks_for_quiet_when_its_query_takes_longer_than_commits(fast: Path) -> None:
    # Given: writers that commit faster than the query can read
    directory = fast / "index"
    writers = [python(WRITER, directory, lane, 1_000_000, "") for lane in (0, 1)]
    try:
        for lane in (0, 1):
            until((directory / f"0{lane}" / "iamglass").exists, "the shard is made")
        until(lambda: _documents(directory) > 3000, "there is something to read")
        # When
        reader = python(HEAVY, directory, 15, pipe=subprocess.PIPE)
        printed, errors = reader.communicate(timeout=4 * LIMIT)
        # Then: no query fails, and the writers were not stopped
        assert reader.returncode == 0, errors
        assert int(printed.split()[1]) >= 15
        before = _generation(directory)
        until(lambda: _generation(directory) > before, "the writers go on")
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def _documents(directory: Path) -> int:
    from outbox.errors import NotReady

    with Index(directory) as index:
        try:
            return index.search("", limit=0).matches
        except NotReady:  # a shard is just being made
            return 0


def _generation(directory: Path) -> int:
    with Index(directory) as index:
        found = index.get("0/0")
    assert found is not None
    return int(found.data["generation"])


def test_index_i10_writer_waits_once_when_a_reader_hangs(fast: Path) -> None:
    # Given: a reader that has asked for quiet, and hangs
    directory = fast / "index"
    assert python(WRITER, directory, 0, 1, fast).wait(LIMIT) == 0
    code = (
        "import sys, time; from pathlib import Path; from outbox.quiet import reading\n"
        "with reading([Path(sys.argv[1])]): print('has it', flush=True); time.sleep(3600)"
    )
    reader = python(code, directory / "00", pipe=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "has it\n"
        # When: a writer makes so many commits that waiting for each would take a quarter of an hour
        # Then: it comes to its end
        assert python(WRITER, directory, 0, 500, fast).wait(LIMIT) == 0
    finally:
        reader.kill()
        reader.communicate()
