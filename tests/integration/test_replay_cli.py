"""`outbox replay` as an operator runs it, with real workers; and what is left when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from outbox import Outbox, Settings
from outbox.blob import BlobStore
from outbox.cli import main
from outbox.errors import IntentRefused
from outbox.failpoint import NAMES
from outbox.participant import Item
from outbox.replay.resent import NAMES as NAMED
from tests.fixtures.site import LIMIT, Site, until
from workers.index import IndexParticipant

POINTS = ["replay.begun", "replay.appended", "replay.saved", "replay.ended"]


class Operator:
    """Runs commands as an operator does, on the site's host."""

    def __init__(self, site: Site, url: str) -> None:
        self.site = site
        self.environment = site.environment | {"OUTBOX_DATABASE": url}

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # What a shell's background job starts has inherited that it can't be interrupted.
            ["env", "--default-signal=INT", sys.executable, "-m", "outbox", *words],
            env=self.environment | more, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str, status: int = 0, **more: str) -> tuple[str, str]:
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == status, err
        return out, err

    def json(self, *words: str) -> Any:
        """What a command prints with `--json`: nothing but JSON."""
        return json.loads(self.run(*words, "--json")[0])

    def repeated(self) -> list[int]:
        """Which intents were repeated, in order."""
        return [
            row[0]
            for row in self.site.admin.execute(
                "select (headers -> 'replay' -> 'of')::bigint from outbox.log where headers ? 'replay' order by id"
            )
        ]


@pytest.fixture
def operate(site: Site, operator_url: str) -> Operator:
    return Operator(site, operator_url)


@pytest.fixture
def app(site: Site, app_url: str) -> tuple[sessionmaker[Any], Outbox]:
    """An application whose small blobs travel in their intents."""
    settings = Settings.load(env=site.environment | {"OUTBOX_DATABASE": app_url, "OUTBOX_BLOB_INLINE": "100"})
    sessions = sessionmaker(sa.create_engine(settings.sqlalchemy_url, poolclass=sa.NullPool))
    return sessions, Outbox(sessions, settings)


def forget(index: Path) -> None:
    """Every document is gone from the index, and its position is not: as if somebody had written behind our back."""
    import xapian

    for shard in index.iterdir():
        if shard.is_dir() and (shard / "iamglass").exists():
            db = xapian.WritableDatabase(str(shard), xapian.DB_OPEN)
            for posting in list(db.postlist("")):
                db.delete_document(posting.docid)
            db.commit()
            db.close()


def contents(index: Path) -> set[tuple[str, str]]:
    items: list[Item] = list(IndexParticipant(index).inventory())
    return {(item.key, item.digest) for item in items}


def mails(home: Path) -> list[EmailMessage]:
    return [
        message_from_bytes(file.read_bytes(), policy=policy.default)
        for file in sorted((home / "mail" / "new").iterdir())
    ]


def test_replay_i8_i9_fills_an_empty_site_and_sends_no_mail(
    site: Site, smtp: str, operate: Operator, app: tuple[sessionmaker[Any], Outbox]
) -> None:
    # Given: a site with documents, blobs and mails, all applied
    sessions, outbox = app
    with sessions.begin() as session:
        for n in range(6):
            outbox.index.put(session, f"note/{n}", text=f"text {n}", keywords={"kind": "note"})
        small = [outbox.blobs.put(session, f"small {n}".encode()).digest for n in range(3)]
        large = outbox.blobs.put(session, b"large" * 1000).digest
        outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject="s", text="t")
    with sessions.begin() as session:
        outbox.index.put(session, "note/1", text="changed")
        outbox.index.delete(session, "note/2")
        outbox.blobs.delete(session, small[2])
    assert site.start("all", "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    store = BlobStore(site.home / "blobs")
    documents = contents(site.home / "index")
    assert {blob.digest for blob in store.inventory()} == {*small[:2], large}
    assert len(mails(site.home)) == 1
    # When both stores lose everything, and all is replayed while the workers run
    forget(site.home / "index")
    for blob in list(store.inventory()):
        store.path(blob.digest).unlink()
    assert contents(site.home / "index") == set()
    site.start("all", OUTBOX_SMTP=smtp)
    done = operate.json("replay", "--yes", "--wait")
    # Then the documents are back, and the blobs whose bytes are anywhere; no mail was sent
    assert contents(site.home / "index") == documents
    assert {blob.digest for blob in store.inventory()} == set(small[:2])
    assert len(mails(site.home)) == 1
    assert done["parked"] == 0
    fates = {(line["target"], line["action"], line["fate"]): line["intents"] for line in done["plan"]["lines"]}
    assert fates["blob", "put", "nowhere"] == done["left_out"]["nowhere"] == 1
    assert fates["mail", "send", "mail"] == 1
    assert fates["index", "put", "again"] == 5
    # And the operation says who did it
    [row] = operate.json("operations", "list", "--kind", "replay")
    assert (row["state"], row["who"], row["request"]) == ("done", "outbox_operator", {})
    assert row["result"] == {"again": done["again"], "left_out": done["left_out"]}


def test_replay_sends_mail_again_under_a_new_message_id_when_it_is_asked_to(
    site: Site, smtp: str, operate: Operator, app: tuple[sessionmaker[Any], Outbox]
) -> None:
    # Given: three mails that were sent, and one that was not yet; one had been refused for its only recipient
    sessions, outbox = app
    with sessions.begin() as session:
        for n in range(3):
            outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject=f"{n}", text="t")
    assert site.start("all", "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    site.admin.execute(
        'update outbox.receipt set evidence = \'{"refused": {"0": "550 5.1.1"}}\' '
        "where id = (select min(id) from outbox.receipt)"
    )
    with sessions.begin() as session:
        outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject="later", text="t")
    clock = site.start("clock")
    shown = "select high >= (select max(id) from outbox.log) from outbox.tick order by id desc limit 1"
    until(lambda: site.one(shown), "a tick shows it")
    clock.terminate()
    assert clock.wait(LIMIT) == 0
    first = {mail["Subject"]: mail for mail in mails(site.home)}
    # When
    done = operate.json("replay", "mail", "--resend-mail", "--yes")
    assert (done["again"], done["left_out"]) == (2, {"refused": 1, "unsent": 1})
    assert site.start("all", "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    # Then
    found = mails(site.home)
    assert sorted(mail["Subject"] for mail in found) == ["0", "1", "1", "2", "2", "later"]
    again = [mail for mail in found if mail[NAMED]]
    assert len({mail["Message-ID"] for mail in found}) == 6
    for mail in again:
        original = first[mail["Subject"]]
        assert mail["Message-ID"].startswith("<replay.")
        assert (mail[NAMED], mail["Date"]) == (original["Message-ID"], original["Date"])


# ------------------------------------------------------------------------------------------- killed, stopped


def drain(site: Site) -> None:
    """The index has everything; afterwards nothing runs."""
    clock = site.start("clock")
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    clock.terminate()
    assert clock.wait(LIMIT) == 0


def fill(site: Site, count: int = 12) -> list[int]:
    """Documents that were written, and a tick that shows them. → their intents, in order of key."""
    for n in range(count):
        site.emit(f"k{n:02}")
    drain(site)
    return [row[0] for row in site.admin.execute("select id from outbox.log order by key")]


@pytest.mark.parametrize("name", POINTS)
def test_replay_i3_i11_repeats_each_intent_once_when_killed_there(site: Site, operate: Operator, name: str) -> None:
    intents = fill(site)
    words = ("replay", "index", "--yes", "--rate", "5")
    # When it is killed there, and the same command is given again
    twice = {"replay.appended": (name, f"{name}:2"), "replay.saved": (name, name)}
    for place in twice.get(name, (name,)):
        operate.run(*words, status=-signal.SIGKILL, OUTBOX_FAILPOINT=place)
    if name != "replay.ended":
        _, err = operate.run(*words)
        assert "was asked for the same and has not ended: it goes on" in err
    # Then every intent was repeated once, by one operation, which has ended
    assert operate.repeated() == intents
    rows = operate.json("operations", "list")
    assert [(row["state"], row["result"]) for row in rows] == [("done", {"again": len(intents), "left_out": {}})]
    drain(site)
    assert len(site.documents()) == len(intents)


def test_replay_of_a_span_goes_on_when_the_same_is_asked_for_later(site: Site, operate: Operator) -> None:
    # Given: a replay of what was written in the last hours, killed in the middle
    intents = fill(site)
    words = ("replay", "index", "--from", "3h", "--to", "0s", "--yes", "--rate", "5")
    operate.run(*words, status=-signal.SIGKILL, OUTBOX_FAILPOINT="replay.saved")
    assert 0 < len(operate.repeated()) < len(intents)
    # When the same is asked for once it is later, by seconds of any clock
    began = site.one("select date_trunc('second', clock_timestamp())")
    until(lambda: site.one("select date_trunc('second', clock_timestamp())") > began, "it is later")
    _, err = operate.run(*words)
    # Then it goes on
    assert "was asked for the same and has not ended: it goes on" in err
    assert operate.repeated() == intents


def test_replay_failpoints_are_all_swept() -> None:
    assert [name for name in NAMES if name.startswith("replay.")] == POINTS


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_replay_can_be_stopped_and_resumed(site: Site, operate: Operator, sent: signal.Signals) -> None:
    intents = fill(site)
    process = operate.start("replay", "index", "--yes", "--rate", "2")
    until(operate.repeated, "something is repeated")
    # When
    process.send_signal(sent)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Not finished; go on with: outbox replay --resume 1" in err
    assert "Traceback" not in err
    assert len(operate.repeated()) < len(intents)
    row = operate.json("operations", "show", "1")
    assert (row["state"], row["runs"]) == ("running", False)
    # Then it can be resumed by its number, and not twice
    assert operate.json("replay", "--resume", "1")["again"] == len(intents)
    assert operate.repeated() == intents
    _, err = operate.run("replay", "--resume", "1", status=1)
    assert "operation 1 has ended (done): begin a new one" in err


def test_operations_can_be_given_up(site: Site, operate: Operator) -> None:
    fill(site)
    operate.run("replay", "index", "--yes", "--rate", "8", status=-signal.SIGKILL, OUTBOX_FAILPOINT="replay.saved")
    out, _ = operate.run("operations", "list")
    assert "to be resumed" in out
    # A plan of the same takes nothing up, and without --yes it is left where it is
    before = site.one("select epoch from outbox.operation")
    assert operate.json("replay", "index", "--dry-run")["plan"]["intents"] == 12
    assert site.one("select epoch from outbox.operation") == before
    _, err = operate.run("replay", "index", status=1)
    assert "Nothing was done: add --yes to do it." in err
    assert len(operate.repeated()) == 8
    out, _ = operate.run("operations", "abandon", "1", "--note", "not needed")
    assert "abandoned" in out
    assert "not needed" in out
    # Then the same, asked for again, is another one
    assert operate.json("replay", "index", "--yes")["operation"] == 2
    for words in (("show", "9"), ("abandon", "9")):
        _, err = operate.run("operations", *words, status=1)
        assert "there is no operation 9" in err


# ------------------------------------------------------------------------------------------- in the command line


def test_replay_writes_nothing_when_it_is_only_planned(site: Site, operate: Operator) -> None:
    fill(site)
    before = site.one("select ((select last_value from outbox.log_id), (select count(*) from outbox.operation))::text")
    out, _ = operate.run("replay", "--dry-run")
    assert "12 intents are repeated, for an unknown time (index not measured)." in out
    assert operate.json("replay", "--dry-run")["plan"]["intents"] == 12
    # Not agreed to, because nobody could be asked
    _, err = operate.run("replay", status=1)
    assert "Nothing was done: add --yes to do it." in err
    # Then nothing was drawn from the log, and no operation is on record
    after = site.one("select ((select last_value from outbox.log_id), (select count(*) from outbox.operation))::text")
    assert after == before
    assert operate.json("operations", "list") == []


def test_replay_does_nothing_when_nothing_fits(site: Site, operate: Operator) -> None:
    fill(site, 1)
    out, _ = operate.run("replay", "--model", "photo", "--yes")
    assert out == "Nothing in the log fits.\n"
    assert operate.json("replay", "--key", "no", "--yes")["plan"]["intents"] == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--key", "a", "--model", "b"], "give one of --key, --key-prefix and --model"),
        (["--resume", "1", "index"], "--resume goes on with what was chosen"),
        (["--from", "yesterday"], "is not a time"),
        (["--rate", "0"], "is not a rate"),
        (["--parked", "retry"], "invalid choice"),
        (["--saga", "x"], "invalid UUID value"),
        (["--after-tick", "0"], "'0' is not an id"),
        (["--key-prefix", ""], "no key is empty"),
    ],
)
def test_replay_refuses_what_makes_no_sense(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["replay", *words])
    assert text in capsys.readouterr().err


def test_replay_needs_an_operator(site: Site, operate: Operator, worker_url: str, capsys: Any) -> None:
    fill(site, 1)
    operate.environment["OUTBOX_DATABASE"] = worker_url
    _, err = operate.run("replay", "--yes", status=1)
    assert "may not repeat intents: use a member of outbox_operator" in err
    assert operate.json("operations", "list") == []
    # ... an application is told what it lacks, too
    operate.environment["OUTBOX_DATABASE"] = worker_url.replace("outbox_worker@", "app@")
    for words in (["replay"], ["adopt"], ["retention", "--age", "1d", "--archive", "none"], ["operations", "list"]):
        _, err = operate.run(*words, status=1)
        assert "permission denied" in err
        assert "that is a member of outbox_operator (GRANT outbox_operator TO …)" in err
    # ... who may not write into the log in any other way
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        url = operate.site.environment["OUTBOX_DATABASE"].replace("outbox_worker@", "outbox_operator@")
        with sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool).begin() as conn:
            conn.execute(
                sa.text("insert into outbox.log (target, action, key, payload) values ('index', 'put', 'k', '{}')")
            )


def test_replay_is_a_command_of_its_own_too(site: Site, operate: Operator) -> None:
    command = shutil.which("replay-outbox", path=os.path.dirname(sys.executable))
    assert command is not None
    done = subprocess.run(
        [command, "--dry-run", "--json"], env=operate.environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["plan"]["lines"] == []


class Base(DeclarativeBase):
    pass


class Photo(Base):
    __tablename__ = "photo"
    id: Mapped[int] = mapped_column(primary_key=True)


class Portrait(Photo):
    pass


def test_replay_finds_what_is_about_a_mapped_class_by_its_name(
    site: Site, operate: Operator, app: tuple[sessionmaker[Any], Outbox]
) -> None:
    # Given: documents and a blob of one class, a document of another one, and of none
    sessions, outbox = app
    with sessions.begin() as session:
        with outbox.about(session, Photo(id=1)):
            outbox.index.put(session, "p1", text="of a photo")
            digest = outbox.blobs.put(session, b"of a photo").digest
            with outbox.about(session, Portrait):
                outbox.index.put(session, "p2", text="of a portrait")
            outbox.emit(session, "index", "put", "p3", {"text": "of a photo"}, headers={"traceparent": "00-1"})
        outbox.index.put(session, "p4", text="of none")
        outbox.index.put(session, "Photo/5", text="of a photo by its key")
        with pytest.raises(IntentRefused, match="int is not a mapped class"), outbox.about(session, 3):
            pass
    headers = "select headers from outbox.log where key = 'p3'"
    assert site.one(headers) == {"traceparent": "00-1", "model": "Photo"}
    drain(site)
    # When, then
    counts = operate.json("replay", "--model", "Photo", "--dry-run")["plan"]["lines"]
    assert {line["target"]: line["intents"] for line in counts} == {"index": 3, "blob": 1}
    operate.run("replay", "--model", "Photo", "--yes")
    again = "select key from outbox.log where headers ? 'replay' and headers ->> 'model' = 'Photo'"
    assert {row[0] for row in site.admin.execute(again)} == {digest, "p1", "p3"}
    assert len(operate.repeated()) == 4
    assert operate.json("replay", "--model", "Portrait", "--yes")["again"] == 1
