"""The disk is really full: the lane waits and says why, nothing is parked, and everything goes on when there is room.

Each participant has a small tmpfs of its own; room is made by mounting it again with another size.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import migrate
from outbox.errors import BlobRefused, NotReady
from tests.fixtures.promises import Promises, indexed
from tests.fixtures.site import Site, until
from workers.index import IndexParticipant
from workers.postgres import Postgres

pytestmark = [pytest.mark.root, pytest.mark.slow]


class SmallDisk:
    """A tmpfs with little room."""

    def __init__(self, room: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="ob-"))
        self.home.chmod(0o755)
        self.path = self.home / "mnt"
        self.path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{room},mode=755", "tmpfs", self.path], check=True)

    def make_room(self, room: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{room}", self.path], check=True)

    def destroy(self) -> None:
        # Lazily if somebody still uses it.
        if subprocess.run(["umount", self.path], check=False, capture_output=True).returncode:
            subprocess.run(["umount", "-l", self.path], check=True)
        shutil.rmtree(self.home)


@pytest.fixture
def small() -> Iterator[Callable[[str], SmallDisk]]:
    made: list[SmallDisk] = []

    def make(room: str) -> SmallDisk:
        made.append(SmallDisk(room))
        return made[-1]

    try:
        yield make
    finally:
        for disk in made:
            disk.destroy()


def waiting(site: Site, target: str) -> str:
    """Why a lane waits, as `outbox status` says it; empty while it doesn't."""
    done = subprocess.run(
        [sys.executable, "-m", "outbox", "status", "--json"],
        env=site.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lanes = json.loads(done.stdout)["lanes"]
    return next((lane["reason"] for lane in lanes if lane["target"] == target and lane["state"] == "waiting"), "")


def words(chance: random.Random) -> str:
    """10 KB of text that an index can't make small."""
    return " ".join(f"{chance.randrange(1 << 40):x}" for _ in range(1000))


def test_index_i2_i10_waits_and_goes_on_when_its_disk_is_really_full(
    site: Site, promises: Promises, small: Callable[[str], SmallDisk]
) -> None:
    # Given: an index that doesn't fit on its disk
    disk = small("size=2m")
    site.environment["OUTBOX_INDEX"] = str(disk.path / "index")
    chance = random.Random(1)
    for number in range(60):
        site.emit(f"k{number}", words(chance))
    promises.tick()

    # Then: the lane waits and says so, and nothing is parked
    worker = site.start("index", "--until-idle")
    until(lambda: "can't be written" in waiting(site, "index"), "the lane says that it waits")
    assert "see to its disk" in waiting(site, "index")
    assert site.one("select count(*) from outbox.parked where target = 'index'") == 0
    # And: what is there is whole
    list(IndexParticipant(disk.path / "index").inventory())

    # When: there is room
    disk.make_room("size=64m")
    # Then: it goes on by itself, and is complete
    assert worker.wait(90) == 0
    held = {item.key: (item.id, item.digest) for item in IndexParticipant(disk.path / "index").inventory()}
    assert held == indexed(site.admin, "true")
    assert len(held) == 60


@pytest.mark.parametrize("room", ["size=4m", "nr_inodes=60"])
def test_blob_i1_i2_i10_refuses_before_the_commit_and_waits_when_its_disk_is_really_full(
    site: Site, promises: Promises, small: Callable[[str], SmallDisk], room: str
) -> None:
    # Given: blobs are staged until there is no room
    disk = small(room)
    site.environment["OUTBOX_BLOBS"] = str(disk.path / "blobs")
    promises.store.directory = disk.path / "blobs"
    with pytest.raises(BlobRefused, match=r"has no room for this blob: make room there, then stage it again"):
        for number in range(1000):
            promises.put_blob(f"{number} " * 20_000)
            promises.app.commit()
    promises.app.commit()
    # Then: nothing of the refused one is left
    count = site.one("select count(*) from outbox.log")
    assert len(promises.blobs) == count == len(list(promises.store.stages()))

    # And: where publishing needs room, the lane waits and says so, and nothing is parked
    promises.tick()
    worker = site.start("blob", "--until-idle")
    if "inodes" in room:
        until(lambda: "No space left" in waiting(site, "blob"), "the lane says that it waits")
        assert site.one("select count(*) from outbox.parked") == 0
        disk.make_room("nr_inodes=10000")
    # When: there is room, then: it goes on by itself, and is complete
    assert worker.wait(90) == 0
    promises.check("blob")
    disk.make_room("size=64m")
    promises.put_blob("and the next")
    promises.app.commit()
    promises.tick()
    assert site.start("blob", "--until-idle").wait(90) == 0
    promises.check("blob")


def test_postgres_i2_i5_i10_everything_committed_is_applied_when_its_disk_was_really_full(
    small: Callable[[str], SmallDisk], tmp_path: Path
) -> None:
    # Given: a Postgres of its own, with some 6 MB left, and workers at work
    disk = small("size=400m")
    postgres = Postgres(disk.path / "pg", disk.home / "run")
    postgres.init()
    postgres.start()
    site: Site | None = None
    try:
        postgres.provide()
        migrate.upgrade(postgres.url(database="app"))
        admin = psycopg.connect(postgres.url(database="app"), autocommit=True)
        site = Site(postgres.url("outbox_worker", "app"), admin, tmp_path)
        workers = [site.start("clock"), site.start("index")]
        site.emit("first")
        until(lambda: site.documents() == ["first"], "the first is there")
        used = shutil.disk_usage(disk.path).used
        disk.make_room(f"size={used + (6 << 20)}")

        # When: an application writes until there is no room
        committed = _fill(postgres)
        assert committed

        # Then: when there is room, everything that was committed is applied, by workers that never ended
        disk.make_room("size=400m")
        admin.close()
        site.admin = _connect(postgres)
        until(lambda: set(committed) <= set(site.documents()), "everything committed is applied")
        assert all(worker.poll() is None for worker in workers)
        assert site.one("select count(*) from outbox.parked") == 0
        held = {item.key: (item.id, item.digest) for item in IndexParticipant(tmp_path / "index").inventory()}
        assert held == indexed(site.admin, "true")
    finally:
        if site is not None:
            site.close()
            site.admin.close()
        if postgres.pid() is not None:
            postgres.stop("immediate")


def _fill(postgres: Postgres) -> list[str]:
    """Commit intents of 60 KB until Postgres refuses. → the keys that were committed."""
    chance, committed = random.Random(2), []
    # Said before the commit, in words; or the server is gone.
    with (
        pytest.raises(psycopg.OperationalError, match=r"No space left|connection"),
        psycopg.connect(postgres.url("app", "app"), autocommit=True) as conn,
    ):
        for number in range(2000):
            body = json.dumps({"text": "", "data": {"x": chance.randbytes(30_000).hex()}})
            conn.execute("select outbox.emit('index', 'put', %s, %s)", (f"k{number}", body))
            committed.append(f"k{number}")
    return committed


def _connect(postgres: Postgres) -> psycopg.Connection[Any]:
    def connected() -> psycopg.Connection[Any] | None:
        if postgres.pid() is None:
            # Without room for WAL the server ends, and whoever supervises it starts it again.
            with suppress(NotReady):
                postgres.start()
        try:
            return psycopg.connect(postgres.url(database="app"), autocommit=True)
        except psycopg.OperationalError:
            return None

    found: psycopg.Connection[Any] = until(connected, "Postgres answers")
    return found
