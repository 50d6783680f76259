"""Parking by real workers: what can't be read, what kills its worker, and operators while they run."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from outbox.cli import main
from tests.fixtures.site import LIMIT, Site, until

#: JSON that Postgres stores, and that no participant can do anything with.
POISON = {
    "too large a number": "1e5000",
    "too deep": "[" * 1200 + "]" * 1200,
    "too many digits": "9" * 4301,
    "too deep inside": '{"text": "t", "data": {"a": ' + "[" * 1200 + "]" * 1200 + "}}",
    "too large inside": '{"text": "t", "data": {"a": 1e5000}, "size": 1e5000}',
    "a number": "7",
    "a text": '"text"',
    "a list": "[]",
    "null": "null",
    "members of other types": '{"title": 7, "digest": 7, "size": "x", "token": [], "message": {}, "recipients": 7}',
}

ROOT = Path(__file__).parents[2]

ACTION = {"index": "put", "blob": "put", "mail": "send"}


@pytest.mark.parametrize("target", ACTION)
def test_parked_i2_every_payload_that_cannot_be_applied_and_nothing_else(
    site: Site, app_url: str, smtp: str, target: str
) -> None:
    # Given: for each kind of poison an intent, and among them one that is right
    for n, (name, payload) in enumerate(POISON.items()):
        emit = "select outbox.emit(%s, %s, %s, %s::jsonb)"
        site.admin.execute(emit, (target, ACTION[target], f"{name} {target}", payload))
        if n == len(POISON) // 2:
            write_one(site, app_url)
    # When: one worker meets them
    site.start("clock")
    assert site.start(target, "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    # Then: each is parked for an operator, what is right is there, and no error quotes a payload
    parked = site.admin.execute("select key, reason, error from outbox.parked where target = %s", (target,)).fetchall()
    assert {key: reason for key, reason, _ in parked} == {f"{name} {target}": "poison" for name in POISON}
    assert all(error and "text" not in error.split(":")[0].split() for _, _, error in parked)
    assert site.one(f"select deaths from outbox.lane where target = '{target}'") == 0
    assert count_of(site, target) == 1


APPLICATION = """
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
with Session.begin() as session:
    outbox.blobs.put(session, b"right")
    outbox.index.put(session, "right", text="right")
    outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject="right", text="right")
"""


def write_one(site: Site, app_url: str) -> None:
    environment = site.environment | {"OUTBOX_DATABASE": app_url}
    subprocess.run([sys.executable, "-c", APPLICATION], env=environment, check=True, timeout=LIMIT)


def count_of(site: Site, target: str) -> int:
    from outbox.blob import BlobStore

    match target:
        case "index":
            return len(site.documents())
        case "blob":
            return len(list(BlobStore(site.home / "blobs").inventory()))
        case _:
            return len(list((site.home / "mail" / "new").iterdir()))


# ----------------------------------------------------------------------------- what kills its worker


class Mortal:
    """A worker of tests.fixtures.deadly, started again whenever it dies."""

    def __init__(self, site: Site, file: Path) -> None:
        self.site, self.file = site, file
        # A lease that isn't lost when the machine is slow: a batch that is applied again would look like a fault.
        self.environment = site.environment | {"OUTBOX_TTL": "3600"}
        site.admin.execute("select outbox.register('deadly')")

    def emit(self, *keys: str) -> None:
        for key in keys:
            self.site.admin.execute("select outbox.emit('deadly', 'put', %s)", (key,))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.fixtures.deadly", str(self.file)]
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.site.running.append(process)
        return process

    def run(self) -> int:
        """Until it ends by itself. → how often it died."""
        for deaths in range(40):
            # What died in the middle of a try comes again some seconds later. Here at once.
            self.site.admin.execute("update outbox.parked set retry_at = outbox.now() where reason = 'retry'")
            status = self.start().wait(LIMIT)
            if status == 0:
                return deaths
            assert status == -signal.SIGKILL
        raise AssertionError("it died again and again")

    def applied(self) -> list[str]:
        return self.file.read_text(encoding="utf-8").split() if self.file.exists() else []

    def parked(self) -> dict[str, str]:
        return dict(self.site.admin.execute("select key, reason from outbox.parked").fetchall())


def test_parked_i2_i4_an_intent_that_kills_its_worker_and_none_of_its_neighbours(site: Site, tmp_path: Path) -> None:
    # Given: one that kills among many, two of its key behind it, and one that kills only when it is tried again
    mortal = Mortal(site, tmp_path / "applied")
    others = [f"k{n}" for n in range(12)]
    mortal.emit(*others[:5], "killer", *others[5:8], "killer", "later", *others[8:])
    site.start("clock")

    # When: workers are started until one lives
    deaths = mortal.run()

    # Then: both are parked for an operator, what is behind them waits, and the rest is applied, once
    assert deaths >= 6
    assert Counter(mortal.applied()) == Counter(others)
    found = site.admin.execute("select key, reason, error from outbox.parked order by id").fetchall()
    assert found == [
        ("killer", "poison", "killed its worker 3 times"),
        ("killer", "blocked", ""),
        ("later", "poison", "killed its worker 3 times"),
    ]
    assert site.one("select deaths from outbox.lane where target = 'deadly'") == 0


# --------------------------------------------------------------------------- operators, while workers run


def test_parked_i4_i10_a_running_worker_notices_what_an_operator_decides(
    site: Site, operator_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given: a worker that drains, and a key with a poison head
    site.start("clock")
    worker = site.start("index")
    bad = '{"titel": "no such member"}'
    site.admin.execute("select outbox.emit('index', 'put', 'k', %s::jsonb)", (bad,))
    site.emit("k", "second")
    site.emit("other")
    until(lambda: site.documents() == ["other"], "all other keys flow")
    until(lambda: site.one("select count(*) from outbox.parked") == 2, "parked")

    # When: an operator skips it
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    assert main(["parked", "skip", "--key", "k", "--reason", "poison", "--yes", "--note", "a typing error"]) == 0
    assert capsys.readouterr().out == "1 intent skipped.\n"

    # Then: what was behind it is applied, and what comes later doesn't wait for anything
    until(lambda: site.documents() == ["k", "other"], "the next of the key has its turn")
    site.emit("k", "third")
    until(lambda: site.one("select count(*) from outbox.parked where reason <> 'skipped'") == 0, "nothing waits")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT) == 0
    assert site.one("select count(*) from outbox.audit where action = 'skip' and note = 'a typing error'") == 1


def test_parked_a_worker_that_was_killed_gives_its_intents_free_when_the_next_one_runs(
    site: Site,
    operator_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Given: a worker that died of what it tried again, and whose lease has not run out
    mortal = Mortal(site, tmp_path / "applied")
    mortal.emit("later")
    site.start("clock")
    until(lambda: site.one("select owner is not null from outbox.lane where target = 'clock'"), "the clock runs")
    process = mortal.start()
    assert process.wait(LIMIT) == -signal.SIGKILL
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)

    # When, Then: nothing is decided about it as long as it may be being tried
    assert main(["parked", "skip", "1"]) == 1
    assert "being tried right now" in capsys.readouterr().err
    site.admin.execute("update outbox.lane set epoch = epoch + 1, owner = null, lease_until = null")
    assert main(["parked", "skip", "1"]) == 0
    assert mortal.parked() == {"later": "skipped"}
    assert mortal.run() == 0
    assert mortal.applied() == []
