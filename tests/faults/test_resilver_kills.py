"""A resilver that is killed at each of its failpoints, and one that loses its power."""

from __future__ import annotations

import pytest

from outbox.failpoint import NAMES
from tests.fixtures.rebuild import Rebuild, Writers
from tests.fixtures.site import until

MINE = (
    "resilver.built", "resilver.based", "resilver.caught", "resilver.checked", "resilver.swapped", "resilver.drained",
    "resilver.ready", "resilver.removed",
)  # fmt: skip


def test_resilver_i2_i5_i11_either_index_is_whole_when_it_is_killed_anywhere(rebuild: Rebuild) -> None:
    assert set(MINE) == {name for name in NAMES if name.startswith("resilver.")} - {
        "resilver.repeated",
        "resilver.copied",
    }
    # Given an index whose workers run, and writers that write all the time
    site = rebuild.site
    site.start("clock")
    for n in range(200):
        site.emit(f"k{n}")
    site.start("index")
    until(lambda: len(rebuild.inventory()) == 200, "the first index")
    with Writers(rebuild.app_url, 2):
        for number, name in enumerate(MINE, 1):
            # When it is killed there, and searches go on
            shards = number % 3 + 1
            rebuild.run("--yes", "--shards", str(shards), failpoint=name, status=-9)
            # Then what was there at first is found in whichever counts: nothing is deleted of it
            assert {f"k{n}" for n in range(200)} <= rebuild.inventory().keys(), name
            # When the same is asked for again, then it comes to its end
            rebuild.run("--yes", "--shards", str(shards))
            assert rebuild.generation == number
            assert rebuild.folders() == [f"g{number}"], name
            assert {f"k{n}" for n in range(200)} <= rebuild.inventory().keys(), name
    until(lambda: rebuild.inventory() == rebuild.due(), "everything that was written is there")
    assert site.one("select count(*) from outbox.operation where state = 'done'") == len(MINE)


@pytest.mark.parametrize("name", ["resilver.swapped", "resilver.drained"])
def test_resilver_i10_workers_finish_the_swap_when_nobody_resumes_it(rebuild: Rebuild, name: str) -> None:
    # Given a resilver that died when the lanes were swapped, and nobody who looks after it
    site = rebuild.site
    site.start("clock")
    for n in range(50):
        site.emit(f"k{n}")
    worker = site.start("index")
    until(lambda: len(rebuild.inventory()) == 50, "the first index")
    rebuild.run("--yes", "--shards", "2", failpoint=name, status=-9)
    # When the worker goes on, then searches read the new one
    site.emit("later")
    until(lambda: rebuild.generation == 1 and "later" in rebuild.inventory(), "the new generation serves")
    assert rebuild.inventory() == rebuild.due()
    assert worker.poll() is None
