"""Worker processes: real ones, started, stopped and killed from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path

import psycopg
import pytest

from outbox import lane, migrate
from tests.fixtures.site import LIMIT, Site, until
from workers.postgres import DATABASE, Postgres


def test_work_until_idle_applies_everything_and_ends(site: Site) -> None:
    for n in range(5):
        site.emit(f"k{n}")
    site.start("clock")
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    assert site.documents() == [f"k{n}" for n in range(5)]
    assert site.one("select owner is null from outbox.lane where target = 'index'")


def test_work_all_until_idle_needs_no_clock_beside_it(site: Site, smtp: str) -> None:
    site.emit("k")
    assert site.start("all", "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    assert site.documents() == ["k"]
    assert site.one("select count(*) from outbox.lane where owner is not null") == 0


@pytest.mark.parametrize("target", ["index", "clock", "all"])
def test_work_releases_its_lane_and_exits_0_when_terminated(site: Site, target: str) -> None:
    process = site.start(target, OUTBOX_SMTP="smtp://127.0.0.1:1")
    lanes = ("index", "clock", "blob") if target == "all" else (target,)
    for name in lanes:
        query = f"select owner is not null from outbox.lane where target = '{name}'"
        until(partial(site.one, query), f"{name} claimed")
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 0
    for name in lanes:
        assert site.one(f"select owner is null from outbox.lane where target = '{name}'")


def test_work_i10_goes_on_at_once_when_its_predecessor_was_killed(site: Site) -> None:
    site.start("clock")
    first = site.start("index", OUTBOX_TTL="3600")
    site.emit("a")
    until(lambda: site.documents() == ["a"], "the first document")
    first.kill()
    first.wait()
    site.emit("b")
    # The lease lasts an hour; but its owner is seen to be gone.
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    assert site.documents() == ["a", "b"]


def test_work_i6_stopped_worker_writes_nothing_after_another_took_over(site: Site) -> None:
    site.start("clock")
    zombie = site.start("blob")
    until(lambda: site.one("select owner is not null from outbox.lane where target = 'blob'"), "claimed")
    zombie.send_signal(signal.SIGSTOP)
    successor = site.start("blob")
    until(lambda: site.one("select epoch from outbox.lane where target = 'blob'") == 2, "the lease ran out")
    zombie.send_signal(signal.SIGCONT)
    assert zombie.stderr is not None
    # Whoever tells it first, Postgres or the blob store.
    assert any("WARNING" in line and "epoch" in line for line in iter(zombie.stderr.readline, ""))
    assert site.one("select count(*) from outbox.position where target = 'blob' and epoch = 1") <= 1
    successor.send_signal(signal.SIGTERM)
    assert successor.wait(LIMIT) == 0


def test_work_says_what_to_do_when_the_database_is_not_migrated(server: Postgres, site: Site) -> None:
    name = f"empty_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name}")
        process = site.start("index", OUTBOX_DATABASE=server.url("outbox_worker", name))
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert errors.splitlines()[-1].endswith("the database has no outbox schema: run `outbox migrate`")
        assert "Traceback" not in errors
        conn.execute(f"drop database {name} with (force)")


def test_work_says_what_to_do_when_the_database_is_newer(site: Site) -> None:
    site.admin.execute("update outbox.alembic_version set version_num = '9999'")
    process = site.start("index")
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "upgrade the outbox package" in errors
    assert "Traceback" not in errors


def test_work_stops_a_lane_whose_participant_has_seen_another_history(site: Site) -> None:
    site.start("clock")
    site.emit("k")
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    site.admin.execute("update outbox.identity set log = 'ffffffffffffffff'")
    site.emit("never")
    site.start("index")
    until(lambda: site.one("select state from outbox.lane where target = 'index'") == "stopped", "stopped")
    assert "Nothing was skipped" in site.one("select reason from outbox.lane where target = 'index'")
    assert site.documents() == ["k"]


def test_work_i2_goes_on_where_it_was_when_the_database_was_gone(tmp_path: Path) -> None:
    """A server of its own, crashed while a worker and a clock are at work."""
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    home.chmod(0o755)
    server = Postgres(home / "pg", home / "run")
    try:
        server.init()
        server.start()
        server.provide()
        migrate.upgrade(server.url(database=DATABASE))
        with psycopg.connect(server.url(database=DATABASE), autocommit=True) as admin:
            site = Site(server.url("outbox_worker", DATABASE), admin, tmp_path)
            clock, index = site.start("clock"), site.start("index")
            site.emit("before")
            until(lambda: site.documents() == ["before"], "the first document")
        server.stop("immediate")
        server.start()
        server.wait()
        with psycopg.connect(server.url(database=DATABASE), autocommit=True) as site.admin:
            site.emit("after")
            until(lambda: site.documents() == ["after", "before"], "the second document")
            assert clock.poll() is None
            assert index.poll() is None
            assert site.one("select deaths from outbox.lane where target = 'index'") == 0
        site.close()
    finally:
        if server.pid():
            server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


def test_place_tells_a_live_process_from_one_that_is_gone() -> None:
    assert not lane.is_gone(lane.place())
    assert not lane.is_gone("elsewhere/boot/ns/1/1")
    assert not lane.is_gone("nonsense")
    here = lane.place().split("/")
    assert lane.is_gone("/".join([*here[:3], "999999999", "1"]))
    assert lane.is_gone("/".join([*here[:4], "1"]))


@pytest.mark.parametrize("supervised", ["", "1"])
def test_work_ends_when_its_supervisor_is_gone_and_not_when_its_shell_is(site: Site, supervised: str) -> None:
    # Given: a clock whose parent ends as soon as it is told to
    parent = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m outbox work clock >/dev/null 2>&1 & echo $!; read line"],
        env=site.environment | {"SUPERVISOR_ENABLED": supervised},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    clock = int(parent.stdout.readline())
    owned = "select owner is not null from outbox.lane where target = 'clock'"
    until(partial(site.one, owned), "the clock runs")

    # When: the parent ends
    parent.communicate("end\n")

    # Then: a supervisor takes it along, a shell doesn't
    if not supervised:
        site.emit("k")
        until(partial(site.one, "select high > 0 from outbox.tick order by id desc limit 1"), "it ticks on")
        os.kill(clock, signal.SIGTERM)
    until(lambda: not site.one(owned), "the clock has ended")
