"""A participant of a user's own under `outbox work`: named on the command line, or by an installed package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.site import LIMIT, Site

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
from pathlib import Path
from tests.fixtures.reference import Ledger

class Mine(Ledger):
    def __init__(self):
        super().__init__(Path("store"))

ready = True
"""


def work(site: Site, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`outbox work` in the directory of the user's module."""
    environment = site.environment | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run(
        [sys.executable, "-P", "-m", "outbox", "work", *words],
        cwd=site.home, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip


@pytest.fixture
def own(site: Site) -> Site:
    """A site with a module of the user's, a registered target, intents for it, and a clock."""
    (site.home / "mine.py").write_text(MODULE)
    (site.home / "store").mkdir()
    site.admin.execute("select outbox.register('mine', 2)")
    for n in range(10):
        site.admin.execute("select outbox.emit('mine', 'put', %s, %s)", (f"k{n}", json.dumps({"version": n})))
    site.start("clock")
    return site


def versions(site: Site) -> list[int]:
    ledger = site.home / "store" / "ledger"
    return sorted(json.loads(line)[2] for line in ledger.read_text().splitlines()) if ledger.exists() else []


def test_work_i2_i3_drains_into_a_participant_that_is_named(own: Site) -> None:
    for lane in ("0", "1"):
        done = work(own, "mine", "--participant", "mine:Mine", "--lane", lane, "--until-idle")
        assert done.returncode == 0, done.stderr
    assert versions(own) == list(range(10))


def test_work_i3_i11_makes_each_effect_once_when_killed_at_a_failpoint_of_the_users(own: Site) -> None:
    killed = work(own, "mine", "--participant", "mine:Mine", "--lane", "0", OUTBOX_FAILPOINT="own.written:2")
    assert killed.returncode == -9, killed.stderr
    assert len(versions(own)) == 2
    for lane in ("0", "1"):
        assert work(own, "mine", "--participant", "mine:Mine", "--lane", lane, "--until-idle").returncode == 0
    assert versions(own) == list(range(10))


def test_work_finds_the_participant_of_an_installed_package(own: Site) -> None:
    package = own.home / "site"
    (package / "mine-1.0.dist-info").mkdir(parents=True)
    (package / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "mine-1.0.dist-info" / "entry_points.txt").write_text("[outbox.participants]\nmine = mine:Mine\n")
    (own.home / "mine.py").rename(package / "mine.py")
    for lane in ("0", "1"):
        done = work(own, "mine", "--lane", lane, "--until-idle", PYTHONPATH=f"{ROOT}:{package}")
        assert done.returncode == 0, done.stderr
    assert versions(own) == list(range(10))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mine",), "nothing installed is a participant 'mine': name it with --participant"),
        (("mine", "--participant", "mine"), "not of the form MODULE:NAME"),
        (("mine", "--participant", "absent:Mine"), "can't be imported"),
        (("mine", "--participant", "mine:Absent"), "the module mine has no Absent"),
        (("clock", "--lane", "0"), "clock takes no --lane"),
        (("all", "--participant", "mine:Mine"), "all takes no --lane and no --participant"),
        (("other", "--participant", "mine:Mine"), "no participant 'other' is registered"),
    ],
)
def test_work_says_what_is_wrong_with_a_participant(own: Site, words: tuple[str, ...], said: str) -> None:
    done = work(own, *words, "--until-idle")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("outbox work: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
