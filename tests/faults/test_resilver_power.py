"""A resilver whose power is cut: the database never names a generation that the disk doesn't have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from outbox import generation
from outbox.errors import NotReady
from tests.fixtures.power import Machine, Traffic
from tests.fixtures.site import LIMIT, until
from workers.index import IndexParticipant

CUTS = ("resilver.based", "resilver.swapped", "resilver.ready", "resilver.removed")


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(("index",))
    try:
        yield made
    finally:
        made.close()


def resilver(machine: Machine, failpoint: str = "") -> subprocess.Popen[str]:
    """Start one. With a failpoint, it stands still there."""
    environment = os.environ | {
        "OUTBOX_DATABASE": machine.postgres.url("postgres", "app"),
        "OUTBOX_INDEX": str(machine.index),
        "OUTBOX_STATE": str(machine.home / "none"),
        "OUTBOX_FAILPOINT": f"{failpoint}:stop" if failpoint else "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "outbox", "resilver", "index", "--yes"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def stands(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def documents(machine: Machine) -> set[str]:
    try:
        return {item.key for item in IndexParticipant(machine.index).inventory()}
    except NotReady:
        return set()


@pytest.mark.root
def test_resilver_i5_index_is_whole_when_the_power_is_cut_at_each_of_its_steps(machine: Machine) -> None:
    machine.work()
    traffic = Traffic(machine)
    for name in CUTS:
        # Given documents that are reported as applied
        with machine.connect() as conn:
            for _ in range(5):
                traffic.wait(conn, traffic.write(conn))
        wanted = {"same", *(f"k{n}" for n in range(1, len(traffic.committed) + 1))}
        # When the index is built anew, and the power is cut
        process = resilver(machine, name)
        try:
            until(partial(stands, process), f"it stands at {name}")
            # With everything else: it has files open on that disk.
            machine.power_off(process)
        finally:
            process.kill()
            process.communicate()
        machine.power_on()
        machine.work()
        # Then, whichever counts, the workers open it, and it has all that was reported
        with machine.connect() as conn:
            traffic.wait(conn, traffic.write(conn))
        wanted.add(f"k{len(traffic.committed)}")
        assert documents(machine) == wanted, name
        # ... and the same command comes to its end
        process = resilver(machine)
        said = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == 0, said
        assert documents(machine) == wanted, name
        assert generation.folders(machine.index) == [generation.current(machine.index)]
