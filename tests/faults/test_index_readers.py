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
import sys
from pathlib import Path
from outbox.document import document
from outbox.intent import Intent
from outbox.participant import LaneView
from outbox.position import Position
from workers.index import IndexParticipant

directory, lane, commits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
participant = IndexParticipant(directory)
participant.open(LaneView("index", lane, 1, False, ((0, 8191), (8192, 16383))[lane]))
for n in range(1, commits + 1):
    # Ten documents that always change together, and one more that stays.
    batch = [
        Intent.make("index", "put", f"{lane}/{i}", document(text=f"always generation {n}", data={"generation": n}))
        for i in range(10)
    ] + [Intent.make("index", "put", f"{lane}/more/{n}", document(text=f"grows {n} " + "words " * 50))]
    participant.apply([i._replace(id=n) for i in batch], Position("a" * 16, n, "b" * 16))
participant.close()
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
    """In memory, where commits come as fast as they can."""
    place = Path(tempfile.mkdtemp(prefix="ob-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def python(code: str, *words: object, pipe: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def read_through(directory: Path, commits: int) -> tuple[int, int]:
    """Two readers beside two writers of so many commits each. → queries made, and commits that were seen."""
    writers = [python(WRITER, directory, lane, commits) for lane in (0, 1)]
    readers: list[subprocess.Popen[str]] = []
    try:
        for lane in (0, 1):
            until((directory / f"0{lane}" / "iamglass").exists, "the shard is made")
        readers = [python(READER, directory, pipe=subprocess.PIPE) for _ in range(2)]
        queries = seen = 0
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
                queries, seen = max(queries, answer[0]), max(seen, answer[1])
            # Once more when nothing is written any more: the newest commit is seen by whoever looks then.
            if ended:
                assert answer[2:] == [commits, commits]
                return queries, seen
    finally:
        for process in [*readers, *writers]:
            if process in readers:
                _, errors = process.communicate(timeout=LIMIT)
                assert process.returncode == 0, errors
            else:
                process.kill()
                process.wait()


def test_index_readers_see_whole_commits_and_no_error_while_thousands_are_made(fast: Path) -> None:
    queries, seen = read_through(fast / "index", 2000)
    # It was read while it was written.
    assert queries > 20
    assert seen > 5


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
    writers = [python(WRITER, directory, lane, 1_000_000) for lane in (0, 1)]
    try:
        for lane in (0, 1):
            until((directory / f"0{lane}" / "iamglass").exists, "the shard is made")
        until(lambda: _documents(directory) > 3000, "there is something to read")
        # When
        reader = python(HEAVY, directory, 20, pipe=subprocess.PIPE)
        printed, errors = reader.communicate(timeout=LIMIT)
        # Then: no query fails, and the writers were not stopped
        assert reader.returncode == 0, errors
        assert int(printed.split()[1]) >= 20
        before = _documents(directory)
        until(lambda: _documents(directory) > before, "the writers go on")
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


def test_index_i10_writer_waits_once_when_a_reader_hangs(fast: Path) -> None:
    # Given: a reader that has asked for quiet, and hangs
    directory = fast / "index"
    assert python(WRITER, directory, 0, 1).wait(LIMIT) == 0
    code = (
        "import sys, time; from pathlib import Path; from outbox.quiet import reading\n"
        "with reading([Path(sys.argv[1])]): print('has it', flush=True); time.sleep(3600)"
    )
    reader = python(code, directory / "00", pipe=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "has it\n"
        # When: a writer makes so many commits that waiting for each would take an hour
        # Then: it comes to its end
        assert python(WRITER, directory, 0, 2000).wait(LIMIT) == 0
    finally:
        reader.kill()
        reader.communicate()
