"""Disasters as they happen to a whole site: its database is restored, from a dump or from a base backup."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from pathlib import Path

import psycopg
import pytest

from outbox import era
from outbox.blob import BlobStore
from outbox.message import message_payload
from outbox.settings import Settings
from tests.fixtures.actors import ROOT, TABLES, Company
from tests.fixtures.elsewhere import dump, remove, restore, run_server
from tests.fixtures.site import LIMIT, Site, until
from workers.index import IndexParticipant
from workers.postgres import DATABASE, Postgres

TARGETS = ("index", "blob", "mail")


class House(Site):
    """A site in a database that can be replaced, with everything that it was asked for."""

    def __init__(self, server: Postgres, home: Path, smtp: str) -> None:
        self.open(server, DATABASE)
        super().__init__(self.environment["OUTBOX_DATABASE"], self.admin, home)
        self.environment["OUTBOX_SMTP"] = smtp
        self.environment["OUTBOX_TTL"] = "15"
        self.store = BlobStore(home / "blobs")
        self.log = era.identity(self.admin)
        self.workers: dict[str, subprocess.Popen[str]] = {}

    def open(self, server: Postgres, database: str) -> None:
        """Be at home in this database from now on."""
        if hasattr(self, "admin"):
            self.admin.close()
        self.admin = psycopg.connect(server.url(database=database), autocommit=True)
        self.environment = {
            **getattr(self, "environment", {}),
            "OUTBOX_DATABASE": server.url("outbox_worker", database),
            "OUTBOX_SAGA_DATABASE": server.url("saga", database),
        }
        self._actors = {
            "OUTBOX_DATABASE": server.url("app", database), "OUTBOX_ACTOR_DATABASE": server.url("actor", database),
        }  # fmt: skip
        self._operator = server.url("outbox_operator", database)

    def write(self, *names: str) -> None:
        """One intent for each participant under each name."""
        for name in names:
            with self.admin.transaction():
                self.emit(name)
                xid = self.one("select pg_current_xact_id()::text::bigint")
                staged = self.store.stage(name.encode(), xid=xid, log=self.log)
                mail = message_payload(
                    domain="outbox.invalid", sender="a@example.org", to="b@example.org", subject=name, text="text"
                )
                for target, action, key, payload in (
                    ("blob", "put", staged.digest, staged.payload()), ("mail", "send", name, mail),
                ):  # fmt: skip
                    self.admin.execute("select outbox.emit(%s, %s, %s, %s)", (target, action, key, json.dumps(payload)))

    def work(self, *targets: str) -> None:
        for target in targets:
            self.workers[target] = self.start(target)

    def act(self) -> None:
        """A worker of actors, by the name `actor.default`."""
        command = [sys.executable, "-m", "tests.fixtures.actors"]
        environment = self.environment | self._actors
        self.workers["actor.default"] = subprocess.Popen(command, env=environment, cwd=ROOT, text=True)
        self.running.append(self.workers["actor.default"])

    def tell(self, name: str) -> None:
        """A message to an actor that leaves a row when it runs."""
        app, actor = (Settings(url, None, None, "smtp://127.0.0.1:1") for url in self._actors.values())
        company = Company(app, actor)
        try:
            company.note.send(name)
        finally:
            company.close()

    def told(self) -> Counter[str]:
        return Counter(row[0] for row in self.admin.execute("select name from effect"))

    def rest(self, *targets: str) -> None:
        for target in targets:
            process = self.workers.pop(target)
            process.terminate()
            assert process.wait(LIMIT) == 0

    def drained(self, *targets: str) -> bool:
        return not self.one(
            "select exists (select from outbox.unapplied() where target = any(array['" + "','".join(targets) + "']))"
        )

    def stopped(self, *targets: str) -> list[str]:
        """Why these lanes are stopped, when they all are. They look again now and then, so never asked for twice."""

        def reasons() -> list[str]:
            rows = self.admin.execute("select target, reason from outbox.lane where state = 'stopped'")
            found = dict(rows.fetchall())
            return [found[target] for target in targets] if found.keys() >= {*targets} else []

        made: list[str] = until(reasons, f"stopped: {', '.join(targets)}")
        return made

    def adopt(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | {"OUTBOX_DATABASE": self._operator} | more
        command = [sys.executable, "-m", "outbox", "adopt", *(words or ["--yes"])]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT)

    def mails(self) -> Counter[str]:
        parse = BytesHeaderParser().parse
        found: Counter[str] = Counter()
        for folder in ("new", "cur"):
            for path in (self.home / "mail" / folder).glob("*"):
                with path.open("rb") as file:
                    found[parse(file)["Subject"]] += 1
        return found

    def indexed(self) -> set[str]:
        return {item.key for item in IndexParticipant(self.home / "index").inventory()}

    def has(self, name: str) -> bool:
        return self.store.path(hashlib.sha256(name.encode()).hexdigest()).exists()

    def again(self, server: Postgres) -> None:
        """Restart the server."""
        self.admin.close()
        server.stop()
        server.start()
        self.open(server, DATABASE)

    def tick(self) -> int:
        return int(self.one("select max(id) from outbox.tick"))


def _archiving(archive: Path) -> str:
    return f"wal_level = replica\narchive_mode = on\narchive_command = 'cp %p {archive}/%f'\n"


def _restored(server: Postgres, copy: Path, archive: Path) -> Postgres:
    """A server in the place of another one, from its base backup and its log up to the point `here`. It runs."""
    restored = Postgres(copy, server.sockets, binaries=server.binaries)
    with (copy / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write(
            f"\nrestore_command = 'cp {archive}/%f %p'\nrecovery_target_name = 'here'\n"
            "recovery_target_action = 'promote'\n"
        )
    restored._configure()
    (copy / "recovery.signal").touch()
    restored.start()
    return restored


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Iterator[list[Postgres]]:
    """Servers that are removed in the end. The first one runs."""
    made = [run_server(request.config.getoption("--postgres"))]
    try:
        yield made
    finally:
        for server in made:
            remove(server)


@pytest.fixture
def house(servers: list[Postgres], tmp_path: Path) -> Iterator[House]:
    """With the embedded mail server, and its Maildir as evidence."""
    socket = servers[0].data.parent / "smtp.sock"
    made = House(servers[0], tmp_path, f"unix:{socket}")
    command = [sys.executable, "-m", "workers.mailserver", "--maildir", str(tmp_path / "mail")]
    made.running.append(subprocess.Popen([*command, "--listen", f"unix:{socket}"], stderr=subprocess.PIPE, text=True))
    until(socket.exists, "the mail server listens")
    try:
        yield made
    finally:
        made.close()
        made.admin.close()


@pytest.mark.root
def test_adopt_i1_i2_i3_everything_is_there_once_when_a_site_goes_on_from_a_dump(
    house: House, servers: list[Postgres]
) -> None:
    # Given: a site whose database was dumped with everything done, something not done yet, and a lost time after it
    house.work("clock", *TARGETS)
    house.write("done 1", "done 2")
    until(lambda: house.drained(*TARGETS), "drained")
    house.rest(*TARGETS)
    house.write("open 1", "open 2", "open 3")
    dumped = dump(servers[0], DATABASE)
    house.work(*TARGETS)
    house.write("lost 1", "lost 2")
    until(lambda: house.drained(*TARGETS), "drained in the lost time, too")
    house.rest("clock", *TARGETS)
    sent = house.mails()
    assert set(sent.values()) == {1}
    assert len(sent) == 7

    # When: the server is gone, and its workers find another one with what was dumped
    servers.append(run_server(None))
    house.open(servers[1], restore(dumped, servers[1]))
    house.work("clock", *TARGETS)

    # Then: none of them goes on, and each says why
    reasons = house.stopped("clock", *TARGETS)
    assert all("restored from a dump" in why and "outbox adopt" in why for why in reasons)
    tick = house.tick()
    shown = json.loads(house.adopt("--dry-run", "--json").stdout)
    assert shown["looks_like"] == "dump"
    assert {p["target"]: (p["not_done"], p["in_doubt"]) for p in shown["participants"]} == {
        "blob": (3, 0), "index": (3, 0), "mail": (3, 3), "saga": (0, 0),
    }  # fmt: skip
    assert house.adopt("--dry-run").returncode == 0
    assert house.adopt("--json").returncode == 1  # nobody has agreed
    assert house.tick() == tick

    # When: it is adopted
    adopted = house.adopt("--yes", "--json")
    assert json.loads(adopted.stdout)["adopted"] == {"era": 2, "not_done": 9, "in_doubt": 3}, adopted.stderr
    house.write("new 1")

    # Then: they go on by themselves. What had been sent in the lost time is not sent again
    until(lambda: house.drained("blob", "mail"), "drained")
    until(lambda: house.mails()["new 1"], "the new mail")
    assert house.mails() == sent + Counter(["new 1"])
    assert not house.one("select exists (select from outbox.parked)")
    assert all(map(house.has, ("done 1", "open 1", "open 3", "new 1")))
    # ... the index is ahead: it stops, and built anew it has nothing of what the log has lost
    assert "of a time that this log has lost" in house.stopped("index")[0]
    shutil.move(house.home / "index" / "00", house.home / "index" / "00.refused")
    until(lambda: house.drained("index"), "the index is filled again")
    assert house.indexed() == {"done 1", "done 2", "open 1", "open 2", "open 3", "new 1"}
    assert all(worker.poll() is None for worker in house.workers.values())


@pytest.mark.root
def test_history_i2_i3_no_lane_goes_on_when_a_base_backup_was_restored_to_an_earlier_point(
    house: House, servers: list[Postgres], tmp_path: Path
) -> None:
    server = servers[0]
    # Given: a server that archives its log, a base backup, and a named point with mails that are sent after it
    archive, copy = server.data.with_name("archive"), server.data.with_name("copy")
    for folder in (archive, copy):
        folder.mkdir(mode=0o700)
        shutil.chown(folder, server.data.owner(), server.data.group())
    with (server.data / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write(_archiving(archive))
    house.again(server)
    with psycopg.connect(server.url("app", DATABASE), autocommit=True) as conn:
        conn.execute(TABLES)
    house.work("clock", *TARGETS, "saga")
    house.act()
    house.write("done")
    house.tell("done")
    until(lambda: house.drained(*TARGETS) and house.told()["done"], "drained")
    url = f"host={server.sockets} port=5432 user=postgres"
    server._run("pg_basebackup", "--pgdata", str(copy), "--checkpoint=fast", "--dbname", url)
    house.rest(*TARGETS, "saga", "actor.default")
    house.write("open")
    house.tell("open")
    house.rest("clock")
    house.admin.execute("select pg_create_restore_point('here')")
    house.work("clock", *TARGETS)
    house.write("lost")
    until(lambda: house.drained(*TARGETS), "drained in the lost time, too")
    house.rest("clock", *TARGETS)
    sent = house.mails()
    house.admin.execute("select pg_switch_wal()")
    # ... and no machine remembers what it has seen
    shutil.rmtree(house.home / "none" / "watermark")

    # When: that point is restored
    house.admin.close()
    server.stop()
    restored = _restored(server, copy, archive)
    servers.append(restored)
    house.open(restored, DATABASE)
    until(lambda: not house.one("select pg_is_in_recovery()"), "it is promoted")
    tick = house.tick()
    house.write("here")
    house.work("clock", *TARGETS, "saga")
    house.act()

    # Then: no lane goes on. No tick is taken, and nothing is sent
    assert all(
        "restored to an earlier time" in why for why in house.stopped("clock", *TARGETS, "saga", "actor.default")
    )
    assert (house.tick(), house.mails(), house.told()) == (tick, sent, Counter(["done"]))

    # And: adopted, everything is there once
    assert house.adopt().returncode == 0
    until(lambda: house.mails()["here"], "the new mail")
    until(lambda: house.drained("blob", "mail"), "drained")
    assert house.mails() == sent + Counter(["here"])
    assert "of a time that this log has lost" in house.stopped("index")[0]
    assert all(map(house.has, ("done", "open", "here")))
    until(lambda: house.told()["open"], "the actors go on")
    assert house.told() == Counter(["done", "open"])
    until(lambda: house.one("select state = 'draining' from outbox.lane where target = 'saga'"), "and the sagas")


@pytest.mark.root
def test_history_i2_i3_no_lane_goes_on_when_the_files_were_rolled_back_as_a_whole(
    house: House, servers: list[Postgres]
) -> None:
    """As a snapshot of a file system or of a machine: Postgres itself can't know."""
    server = servers[0]
    house.work("clock", *TARGETS)
    house.write("done")
    until(lambda: house.drained(*TARGETS), "drained")
    house.rest(*TARGETS)
    house.write("open")
    house.rest("clock")
    house.admin.close()
    server.stop()
    copy = server.data.with_name("copy")
    subprocess.run(["cp", "-a", server.data, copy], check=True)
    server.start()
    house.open(server, DATABASE)
    house.work("clock", *TARGETS)
    house.write("lost")
    until(lambda: house.drained(*TARGETS), "drained")
    house.rest("clock", *TARGETS)
    sent = house.mails()
    house.admin.close()
    server.stop()
    shutil.rmtree(server.data)
    copy.rename(server.data)
    server.start()
    house.open(server, DATABASE)
    tick = house.tick()
    # When: only the mail's worker starts, which has nothing to compare, and then the others
    house.work("mail")
    # Then: it goes by what its machine has seen; and nobody goes on after that
    assert "was seen" in house.stopped("mail")[0]
    shutil.rmtree(house.home / "none" / "watermark")
    house.work("clock", "blob")
    assert len(set(house.stopped("clock", "blob", "mail"))) == 1
    assert (house.tick(), house.mails()) == (tick, sent)


@pytest.mark.root
def test_history_i3_no_lane_goes_on_from_a_copied_state_directory(house: House) -> None:
    # Given: a state directory that was copied while everything was well
    house.work("clock", "mail")
    house.write("done")
    until(lambda: house.drained("mail"), "drained")
    house.rest("clock", "mail")
    shutil.copytree(house.home / "none", house.home / "copy")
    house.write("open")
    # When: workers start with the copy, then with the original
    house.environment["OUTBOX_STATE"] = str(house.home / "copy")
    house.work("clock", "mail")
    # Then: with the copy they don't go on
    assert all("this state directory is a copy" in why for why in house.stopped("clock", "mail"))
    house.rest("clock", "mail")
    assert house.mails() == Counter(["done"])
    house.environment["OUTBOX_STATE"] = str(house.home / "none")
    house.work("clock", "mail")
    until(lambda: house.mails() == Counter(["done", "open"]), "the original goes on")
    house.rest("clock", "mail")
    # And: with the copy when it was adopted
    house.environment["OUTBOX_STATE"] = str(house.home / "copy")
    assert house.adopt().returncode == 0
    house.write("new")
    house.work("clock", "mail")
    until(lambda: house.mails() == Counter(["done", "open", "new"]), "the copy goes on")


@pytest.mark.root
@pytest.mark.parametrize("point", ["adopt.begun", "adopt.written", "adopt.adopted"])
def test_adopt_i2_i11_is_done_or_not_when_killed(house: House, point: str) -> None:
    # Given: a log that was halted, with something not done
    house.write("open")
    era.halt(house.admin, "for the test")
    # When: adopt is killed
    assert house.adopt("--yes", OUTBOX_FAILPOINT=point).returncode == -9
    number = house.one("select max(number) from outbox.era")
    ticks = house.one("select count(*) from outbox.tick")
    assert (number, ticks) == ((2, 3) if point == "adopt.adopted" else (1, 1))
    # Then: the same command goes on, or says that it is done; and there is one record of it
    again = house.adopt()
    assert again.returncode == (1 if point == "adopt.adopted" else 0), again.stderr
    if again.returncode:
        assert "nothing to adopt" in again.stderr
    assert house.one("select count(*) from outbox.era") == 2
    assert house.one("select string_agg(state, ' ') from outbox.operation where kind = 'adopt'") == "done"
    house.work("clock", *TARGETS)
    until(lambda: house.drained(*TARGETS) and house.mails()["open"], "drained")
