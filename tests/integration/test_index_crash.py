"""The index participant when its process dies, and what it has told the disk before it could die."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.participant import Item
from tests.integration.test_index import Opener, batch, opened
from workers.index import IndexParticipant

__all__ = ["opened"]  # a fixture

WORKER = """
import sys
from pathlib import Path
from outbox.participant import LaneView
from tests.integration.test_index import at, batch
from workers import shard
from workers.index import IndexParticipant

if "unsynced" in sys.argv:
    shard.os.fsync = lambda fd: None
participant = IndexParticipant(Path(sys.argv[1]))
participant.open(LaneView("index", 0, int(sys.argv[2]), False))
done = participant.position()
for number in range(done.tick + 1 if done else 1, 6):
    participant.apply(batch(number), at(number))
"""


def work(directory: Path, epoch: int, *more: str, failpoint: str = "", under: tuple[str, ...] = ()) -> int:
    """Run a worker process that applies batches 1 to 5. → its exit status."""
    environment = {**os.environ, "OUTBOX_FAILPOINT": failpoint}
    command = [*under, sys.executable, "-c", WORKER, str(directory), str(epoch), *more]
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, check=False, timeout=60).returncode


@pytest.mark.parametrize("failpoint", ["index.documents", "index.committed"])
@pytest.mark.parametrize("times", [1, 3])
def test_index_i3_i5_agrees_with_its_position_when_killed(
    opened: Opener, tmp_path: Path, failpoint: str, times: int
) -> None:
    index = tmp_path / "index"
    # I11: it died where it was to die.
    assert work(index, 1, failpoint=f"{failpoint}:{times}") == -signal.SIGKILL
    survivor = opened(epoch=2)
    position = survivor.position()
    reached = position.tick if position else 0
    assert reached == (times if failpoint == "index.committed" else times - 1)
    _expect(survivor, reached)
    survivor.close()
    assert work(index, 3) == 0
    _expect(opened(epoch=4), 5)


def _expect(participant: IndexParticipant, batches: int) -> None:
    expected: dict[str, int] = {intent.key: intent.id for n in range(1, batches + 1) for intent in batch(n)}
    items: list[Item] = list(participant.inventory())
    assert {item.key: item.id for item in items} == expected
    assert len(items) == len(expected)


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def unsynced_renames(trace: str, folder: Path) -> tuple[int, int]:
    """→ renames into `folder`, and how many of them were followed by a write there before its fsync."""
    renames, bad, pending = 0, 0, False
    for line in trace.splitlines():
        if re.search(rf'rename\w*\(.*"{re.escape(str(folder))}/iamglass"', line):
            bad += pending
            renames, pending = renames + 1, True
        elif "fsync" in line and f"<{folder}>" in line:
            pending = False
        elif pending and re.search(rf"(write\w*|rename\w*)\(\d+<{re.escape(str(folder))}/", line):
            bad, pending = bad + 1, False
    return renames, bad + pending


@needs_strace
@pytest.mark.parametrize(("more", "synced"), [((), True), (("unsynced",), False)], ids=["synced", "i12-unsynced"])
def test_index_i5_fsyncs_the_directory_after_each_commit_before_the_next_write(
    tmp_path: Path, more: tuple[str, ...], *, synced: bool
) -> None:
    trace = tmp_path / "trace"
    calls = "trace=rename,renameat,renameat2,fsync,fdatasync,write,pwrite64,pwritev,writev"
    under = ("strace", "-f", "-y", "-s", "200", "-e", calls, "-o", str(trace))
    assert work(tmp_path / "index", 1, *more, under=under) == 0
    renames, bad = unsynced_renames(trace.read_text(), tmp_path / "index" / "00")
    # Made, epoch, five batches.
    assert renames >= 6
    # I12: the check notices a worker that doesn't.
    assert bad == 0 if synced else bad >= 5
