"""The N-th system call of a protocol kills its process or fails, for every N: nothing is half-done, lost or twice.

strace injects the fault into the real process. A killed one is started again; one that was told of an error has to go
on by itself when the error is gone. The sweep over N ends when there is no N-th call any more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.failpoints import Victims
from tests.fixtures.promises import Promises
from tests.fixtures.site import LIMIT, Site, until
from tests.fixtures.zygote import Zygote
from workers.sweeper import sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: `make test-packages` does it"),
]

KILL, FAILS, FULL = "signal=SIGKILL", "error=EIO", "error=ENOSPC"
WRITING = [KILL, FAILS, FULL]

INDEX = {"write": WRITING, "pwrite64": WRITING, "rename": WRITING, "fdatasync": [KILL, FAILS], "fsync": [KILL, FAILS]}
BLOB = {"linkat": WRITING, "renameat": WRITING, "mkdirat": WRITING, "fsync": [KILL, FAILS], "unlinkat": [KILL, FAILS]}
STAGE = {"write": WRITING, "fsync": [KILL, FAILS, FULL]}

#: What a lane says that waits for its participant's disk; anything else it may warn of is a fault.
WAITS = re.compile(
    r"WARNING (\w+/0: waits: the (index shard .* can't be (written|opened) |blob store's file system fails )"
    r"|no watermark can be written )"
)


def each(calls: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(call, fault) for call, faults in calls.items() for fault in faults]


class Tracer:
    """Runs a program under strace."""

    def __init__(self, site: Site, store: Path) -> None:
        self._site, self._store = site, store
        self._trace = site.home / "trace"
        self.said = ""
        #: Runs in which the lane said that it waits.
        self.waits = 0

    def run(self, command: list[str], call: str, inject: str = "", **environment: str) -> int:
        """→ the program's status: -9 if it was killed."""
        # Not its compiled modules: they would be written once, and then no more.
        environment = self._site.environment | environment | {"PYTHONDONTWRITEBYTECODE": "1"}
        strace = ["strace", "-f", "-qq", "-y", "-o", str(self._trace), "-e", f"trace={call}"]
        faults = ["-e", f"inject={call}:{inject}"] if inject else []
        done = subprocess.run(
            [*strace, *faults, *command], env=environment, check=False, timeout=LIMIT, capture_output=True, text=True
        )
        self.said = done.stderr
        assert "Traceback" not in self.said, self.said
        warnings = [line for line in self.said.splitlines() if re.search("WARNING|ERROR", line)]
        assert all(map(WAITS.search, warnings)), self.said
        self.waits += bool(warnings)
        return done.returncode

    def lines(self) -> list[str]:
        return self._trace.read_text(encoding="utf-8", errors="replace").splitlines()

    def first(self) -> int:
        """Of the last run: the number of the first call that is about the store."""
        for number, line in enumerate(self.lines(), 1):
            if str(self._store) in line:
                return number
        raise AssertionError("the store was not touched")

    def fired(self) -> bool:
        """Whether there was an N-th call."""
        lines = self.lines()
        return any("(INJECTED)" in line for line in lines) or any("killed by SIGKILL" in line for line in lines)


def faults(tracer: Tracer, command: list[str], call: str, fault: str) -> Iterator[tuple[int, int]]:
    """Run with the fault at the first call that is about the store, at the second … → (number, status) of each run.

    Each is to be followed by a check, and the first to be preceded by traffic: a run without a fault comes before.
    """
    assert tracer.run(command, call) == 0
    first = number = tracer.first()
    yield 0, 0
    while True:
        status = tracer.run(command, call, f"{fault}:when={number}")
        if not tracer.fired():
            assert number > first, f"no {call} was made to fail"
            return
        yield number, status
        number += 1


def work(target: str) -> list[str]:
    return [sys.executable, "-m", "outbox", "work", target, "--until-idle"]


@pytest.mark.parametrize(("call", "fault"), each(INDEX))
def test_syscalls_i2_i3_index_is_right_when_any_one_kills_or_fails(
    site: Site, promises: Promises, zygote: Zygote, call: str, fault: str
) -> None:
    # Given: a log with everything that the index can meet, and an index that starts from nothing each time
    tracer, index = Tracer(site, site.home / "index"), Victims(promises, zygote, "index")
    promises.make("index")
    for number, status in faults(tracer, work("index"), call, fault):
        # Then: it is complete, after another start if it was killed
        if fault == KILL and number:
            assert status == -9
            index.drain()
        assert status in (0, -9), tracer.said
        promises.check("index")
        shutil.rmtree(site.home / "index")
        promises.make("index")
    assert bool(tracer.waits) == (fault != KILL)


@pytest.mark.parametrize(("call", "fault"), each(BLOB))
def test_syscalls_i2_i3_blobs_are_right_when_any_one_kills_or_fails(
    site: Site, promises: Promises, zygote: Zygote, call: str, fault: str
) -> None:
    # Given: new blobs, old ones, deleted ones
    tracer, blob = Tracer(site, site.home / "blobs"), Victims(promises, zygote, "blob")
    promises.make("blob")
    for number, status in faults(tracer, work("blob"), call, fault):
        # Then: they are all there and whole, after another start if it was killed
        if fault == KILL and number:
            assert status == -9
            blob.drain()
        assert status in (0, -9), tracer.said
        promises.check("blob")
        promises.make("blob")
    assert bool(tracer.waits) == (fault != KILL)


STAGING = """
import json, os, sys, psycopg
from outbox.blob import BlobStore
from outbox.errors import BlobRefused
store, content = BlobStore(os.environ["OUTBOX_BLOBS"]), b"ab" * 1_300_000
with psycopg.connect(sys.argv[1]) as conn:
    (xid, log), = conn.execute("select pg_current_xact_id()::text, log from outbox.identity")
    try:
        staged = store.stage(content, xid=int(xid), log=log)
    except BlobRefused as error:
        raise SystemExit(str(error))
    conn.execute("select outbox.emit('blob', 'put', %s, %s)", (staged.digest, json.dumps(staged.payload())))
"""


@pytest.mark.parametrize(("call", "fault"), each(STAGE))
def test_syscalls_i1_i2_staging_leaves_nothing_when_any_one_kills_or_fails(
    site: Site, promises: Promises, zygote: Zygote, app_url: str, call: str, fault: str
) -> None:
    tracer = Tracer(site, site.home / "blobs")
    command = [sys.executable, "-c", STAGING, app_url]
    assert tracer.run(command, call) == 0
    first = number = tracer.first()
    while True:
        status = tracer.run(command, call, f"{fault}:when={number}")
        if not tracer.fired():
            break
        # Then: nothing is committed, and the application is told why, before its commit
        assert status == (-9 if fault == KILL else 1)
        if fault != KILL:
            assert re.match("the blob store (has no room|can't be written).*, then stage it again", tracer.said)
            assert len(list(promises.store.stages())) == 1, "the first one's"
        number += 1
    assert number > first
    # The run before, and the one after the last call.
    assert site.one("select count(*) from outbox.log") == 2
    # And: of what killed ones left, nothing stays; the same bytes can be staged at once, and are published
    content = "ab" * 1_300_000
    promises.blobs.add(promises.put_blob(content))
    promises.make("blob")
    until(lambda: not sweep(promises.worker, promises.store, log=promises.log, trash_age=0).running, "rolled back")
    Victims(promises, zygote, "blob").drain()
