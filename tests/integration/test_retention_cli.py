"""`outbox retention` as operators use it, killed anywhere; what status says; and the clock, which does the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outbox import archive, failpoint, retention, status, tick
from outbox.cli import main
from outbox.errors import NotReady
from outbox.settings import Settings
from tests.fixtures.lanes import TARGET, Bench
from tests.fixtures.retention import AGE, base, fill, grow_old, names
from tests.fixtures.s3 import Server
from tests.fixtures.site import LIMIT, Site, until

#: Where a process can die on its way.
POINTS = (
    "retention.written",
    "retention.archived",
    "retention.noted",
    "retention.carried",
    "retention.dropped",
    "retention.forgotten",
)


@pytest.fixture
def old(bench: Bench, operator_url: str, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A log with a partition that can go: three keys, of which one is deleted, and a receipt."""
    reader = bench.reader()
    numbers = [bench.emit(f"k{n}", n) for n in range(3)]
    sent = bench.admin.execute("select outbox.emit(%s, 'delete', 'k1')", (TARGET,)).fetchone()
    assert sent is not None
    bench.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch, closed_at) "
        "select unnest(%s::bigint[]), %s, 0, 'closed', 1, now()",
        ([numbers[1], *sent], TARGET),
    )
    fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    monkeypatch.setenv("OUTBOX_STATE", str(shelf.parent / "none"))
    monkeypatch.setenv("OUTBOX_RETENTION", "30d")
    monkeypatch.setenv("OUTBOX_ARCHIVE", str(shelf))
    return bench


def _gone(bench: Bench, shelf: Path) -> None:
    """All of it has come true, once."""
    assert names(bench.admin)[0] == "log_000001"
    assert base(bench.admin) == {"k0": 0, "k2": 2}
    assert [archive.verify(found) for found in archive.find(shelf)] == [4]
    assert bench.admin.execute("select count(*) from outbox.receipt").fetchone() == (0,)
    noted = bench.admin.execute("select place, name, dropped_at is not null from outbox.archive").fetchall()
    assert noted == [(str(shelf), archive.find(shelf)[0].name, True)]


@pytest.mark.parametrize("name", POINTS)
def test_retention_i2_i5_i11_is_taken_up_where_it_was_when_it_is_killed_at_each_step(
    old: Bench, shelf: Path, name: str
) -> None:
    command = [sys.executable, "-m", "outbox", "retention", "--yes"]
    for _ in range(2):
        killed = subprocess.run(
            command, env={**os.environ, "OUTBOX_FAILPOINT": name}, capture_output=True, check=False, timeout=LIMIT
        )
        if killed.returncode == 0:  # what comes behind it is only reached once
            break
        assert killed.returncode == -9, killed.stderr.decode()
    # Whatever was done, what is live is known
    assert main(["retention", "--yes"]) == 0
    _gone(old, shelf)


def test_retention_points_are_all_swept() -> None:
    assert set(POINTS) == {name for name in failpoint.NAMES if name.startswith("retention.")}


def test_retention_command_prints_its_plan_asks_and_says_what_it_did(
    old: Bench, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # When it is only asked what would go
    assert main(["retention", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "log_000000" in shown
    assert str(shelf) in shown
    # Or nobody agrees
    assert main(["retention"]) == 1
    assert "--yes" in capsys.readouterr().err
    # Then nothing is changed
    assert names(old.admin)[0] == "log_000000"
    assert not shelf.exists()
    # When it is agreed to
    assert main(["retention", "--yes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    _gone(old, shelf)
    assert [each["intents"] for each in report["dropped"]] == [4]
    assert report["horizon"]["id"] == 1_000_000
    assert report["forgotten"] == 2
    # And again there is nothing to do
    assert main(["retention"]) == 0
    assert "still being filled" in capsys.readouterr().out


def test_retention_command_says_why_a_partition_stays(
    old: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old.admin.execute("insert into outbox.follower (name, tick) values ('site/b', 1)")
    assert main(["retention", "--yes"]) == 0
    assert "log_000000 stays: follower site/b needs it" in capsys.readouterr().out
    assert main(["retention", "--age", "90d", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["name"] == "log_000000"
    assert main(["retention", "--age", "90d"]) == 0
    assert "goes when it is 90 d old" in capsys.readouterr().out
    # And what is missing
    monkeypatch.delenv("OUTBOX_ARCHIVE")
    assert main(["retention"]) == 1
    assert "OUTBOX_ARCHIVE is not set" in capsys.readouterr().err
    monkeypatch.delenv("OUTBOX_RETENTION")
    assert main(["retention"]) == 1
    assert "OUTBOX_RETENTION is not set" in capsys.readouterr().err
    monkeypatch.setenv("OUTBOX_RETENTION", "5min")
    assert main(["retention"]) == 1
    assert "an hour or more" in capsys.readouterr().err


def test_retention_command_archives_nothing_when_it_is_told_so(old: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retention", "--yes", "--archive", "none"]) == 0
    assert "not archived" in capsys.readouterr().out
    assert base(old.admin) == {"k0": 0, "k2": 2}
    assert main(["why", "1"]) == 0
    assert "It was not archived" in capsys.readouterr().out


def test_retention_command_archives_to_s3(
    old: Bench, s3_server: Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_S3_ENDPOINT", s3_server.endpoint)
    assert main(["retention", "--yes", "--archive", s3_url]) == 0
    (found,) = archive.find(s3_url, endpoint=s3_server.endpoint)
    assert [row.intent.key for row in archive.read(found, endpoint=s3_server.endpoint)] == ["k0", "k1", "k2", "k1"]


def test_retention_i5_drops_nothing_when_s3_does_not_take_the_archive(
    old: Bench, s3_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, s3_server: Server
) -> None:
    bucket = "s3://no-such-bucket-here/prefix"
    monkeypatch.setenv("OUTBOX_S3_ENDPOINT", s3_server.endpoint)
    assert main(["retention", "--yes", "--archive", bucket]) == 1
    assert "S3" in capsys.readouterr().err
    assert names(old.admin)[0] == "log_000000"


def test_status_says_what_holds_the_log_back_and_who_was_not_seen(
    old: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    now = tick.latest(old.conn).id
    assert status.read(old.conn, retention_age=AGE).held == []
    old.admin.execute(
        "insert into outbox.follower (name, tick, seen_at, note) values ('site/b', 1, now() - interval '3 days', 'b')"
    )
    found = status.read(old.conn, retention_age=AGE)
    assert found.followers[0]["tick"] == 1
    assert found.log["first_id"] == 1
    warnings = " ".join(found.warnings())
    assert "follower site/b was not seen for 3 d" in warnings
    assert "can't be dropped any further: follower site/b" in warnings
    assert main(["status"]) == 0
    assert "site/b" in capsys.readouterr().out
    # And without the setting, nothing is overdue
    assert status.read(old.conn).held == []
    assert now > 1


#: A clock that looks at each round of housekeeping whether something can go.
CLOCK = """
from workers import clock
from outbox.cli import main
clock.RETENTION_EVERY = 0.0
raise SystemExit(main(["work", "clock"]))
"""


def test_clock_drops_what_is_old_by_itself(site: Site, shelf: Path) -> None:
    # Given a clock that is told how old the log gets, and an index
    more = {"OUTBOX_RETENTION": "1d", "OUTBOX_ARCHIVE": str(shelf)}
    command = [sys.executable, "-c", CLOCK]
    site.running.append(subprocess.Popen(command, env=site.environment | more, stderr=subprocess.PIPE, text=True))
    worker = site.start("index")
    site.emit("a")
    site.emit("b")
    until(lambda: site.documents() == ["a", "b"], "both are in the index")

    # When a partition is full, and days go by
    site.admin.execute("select setval('outbox.log_id', 999999)")
    site.emit("c")

    def dropped() -> bool:
        site.admin.execute("select nextval('outbox.log_id')")
        site.admin.execute("update outbox.tick set at = at - interval '2 days' where at > now() - interval '1 day'")
        return bool(site.one("select id from outbox.horizon") == 1_000_000)

    until(dropped, "it is dropped")
    assert [archive.verify(found) for found in archive.find(shelf)] == [2]
    # Then an index that is lost is filled from base and log
    worker.kill()
    worker.wait()
    (site.home / "index").rename(site.home / "lost")
    site.start("index")
    until(lambda: site.documents() == ["a", "b", "c"], "the new index has everything")


def test_settings_name_where_archives_go(tmp_path: Path) -> None:
    env = {"OUTBOX_DATABASE": "postgresql://x@/y", "OUTBOX_STATE": str(tmp_path)}
    assert Settings.load(env=env).retention is None
    with pytest.raises(NotReady, match="OUTBOX_ARCHIVE is not set"):
        retention.place_of(Settings.load(env=env))
    for text, wanted in [("none", "none"), ("/a/b", Path("/a/b")), ("s3://bucket/p", "s3://bucket/p")]:
        assert Settings.load(env=env | {"OUTBOX_ARCHIVE": text}).archive == wanted
    assert Settings.load(env=env | {"OUTBOX_RETENTION": "30d"}).retention == AGE
    with pytest.raises(NotReady, match="an hour"):
        Settings.load(env=env | {"OUTBOX_RETENTION": "often"})
