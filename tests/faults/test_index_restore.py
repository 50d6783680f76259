"""Postgres restored to an earlier time, from a copy of its files: an index of the lost future is not written on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import migrate, status
from outbox.errors import NotReady
from tests.fixtures.site import LIMIT, Site, until
from tests.integration.test_index_shards import digests, drain, due, reason
from workers.postgres import DATABASE, Postgres


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    home.chmod(0o755)
    server = Postgres(home / "pg", home / "run")
    try:
        server.init()
        server.start()
        server.provide()
        migrate.upgrade(server.url(database=DATABASE))
        yield server
    finally:
        if server.pid():
            server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def site(own_server: Postgres, tmp_path: Path) -> Iterator[Site]:
    """Of that server. Its connection is made anew after each restart."""
    made = Site(own_server.url("outbox_worker", DATABASE), connected(own_server), tmp_path)
    yield made
    made.close()
    made.admin.close()


def connected(server: Postgres) -> psycopg.Connection[Any]:
    return psycopg.connect(server.url(database=DATABASE), autocommit=True)


def ended(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(LIMIT)


@pytest.mark.root
def test_index_i1_i2_i8_stops_at_a_restored_log_and_is_filled_again_as_the_status_says(
    own_server: Postgres, site: Site
) -> None:
    server, copy = own_server, own_server.data.with_name("copy")

    # Given: an index, and a copy of the database's files from before its last intents
    clock = site.start("clock")
    site.emit("early")
    drain(site)
    ended(clock)
    site.admin.close()
    server.stop("fast")
    subprocess.run(["cp", "-a", server.data, copy], check=True)
    server.start()
    server.wait()
    site.admin = connected(server)
    clock = site.start("clock")
    for _ in range(3):  # claimed more often than the copy knows
        site.emit("lost")
        drain(site)
    ended(clock)
    site.admin.close()
    server.stop("fast")

    # When: Postgres is restored, and goes on
    shutil.rmtree(server.data)
    copy.rename(server.data)
    server.start()
    server.wait()
    site.admin = connected(server)
    site.emit("late")
    site.start("clock")
    worker = site.start("index")

    # Then: the lane stops before anything is written, the clock too, and the status says what to do
    stopped = until(partial(reason, site), "the lane is stopped")
    assert "restored to an earlier time" in stopped
    until(lambda: "outbox adopt" in " ".join(status.read(site.admin).warnings()), "the status says it")
    assert set(digests(site)) == {"early", "lost"}

    # And: done so, the others go on, and the index says what is to be done about it
    command = [sys.executable, "-m", "outbox", "adopt", "--yes"]
    environment = site.environment | {"OUTBOX_DATABASE": server.url("outbox_operator", DATABASE)}
    subprocess.run(command, env=environment, check=True, timeout=LIMIT)
    shard = site.home / "index" / "00"
    move = f"mv {shard} {shard}.refused"
    until(lambda: move in " ".join(status.read(site.admin).warnings()), "the status says it")
    until(lambda: site.one("select max(id) > min(e.opened) from outbox.tick, (select opened from outbox.era "
                           "order by number desc limit 1) e"), "the clock ticks")  # fmt: skip
    assert set(digests(site)) == {"early", "lost"}

    # And: done so, the same worker goes on by itself, and there is no ghost of the lost time
    subprocess.run(["mv", shard, f"{shard}.refused"], check=True)
    until(lambda: _present(site) == due(site), "it is filled again")
    assert set(digests(site)) == {"early", "late"}
    assert worker.poll() is None


def _present(site: Site) -> dict[str, str]:
    try:
        return digests(site)
    except NotReady:  # not made yet
        return {}
