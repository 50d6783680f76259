"""The command `outbox scrub` as a process: what it prints, its exit status, its plan, kills at every failpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.blob import BlobStore
from tests.fixtures.site import LIMIT, Site, until
from workers.shard import xapian

POINTS = ("scrub.spilled", "scrub.confirmed", "scrub.saved", "scrub.aside", "scrub.emitted")


class Depot:
    """A site whose participants hold something, drained, and the command as an operator runs it."""

    def __init__(self, site: Site, operator_url: str, operator: psycopg.Connection[Any]) -> None:
        self.site, self.operator = site, operator
        self.store = BlobStore(site.home / "blobs")
        self.environment = site.environment | {"OUTBOX_DATABASE": operator_url, "OUTBOX_MAIL_EVIDENCE": "none"}

    def fill(self) -> list[str]:
        """Documents and blobs. → the digests, of which the log has the bytes."""
        digests = []
        for n in range(8):
            self.site.emit(f"note/{n}", f"words of {n}")
            digest = hashlib.sha256(b"%d" % n).hexdigest()
            body = {"digest": digest, "size": 1, "bytes": b64encode(b"%d" % n).decode()}
            self.site.admin.execute("select outbox.emit('blob', 'put', %s, %s)", (digest, json.dumps(body)))
            digests.append(digest)
        self.drain()
        return digests

    def drain(self) -> None:
        clock = self.site.start("clock")
        workers = [self.site.start(target, "--until-idle") for target in ("index", "blob")]
        for worker in workers:
            assert worker.wait(LIMIT) == 0
        clock.terminate()
        clock.wait(LIMIT)

    def damage_index(self) -> None:
        db = xapian.WritableDatabase(str(self.site.home / "index" / "00"), xapian.DB_OPEN)
        db.delete_document("Qnote/2")
        db.close()

    def damage_blob(self, digest: str) -> None:
        path = self.store.path(digest)
        path.chmod(0o640)
        path.write_bytes(b"!")

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "outbox", "scrub", *words], env=self.environment | environment, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * LIMIT,
        )  # fmt: skip

    def states(self) -> list[str]:
        return [row[0] for row in self.operator.execute("select state from outbox.operation order by id")]


@pytest.fixture
def depot(site: Site, operator_url: str, operator: psycopg.Connection[Any]) -> Depot:
    return Depot(site, operator_url, operator)


def test_scrub_command_tells_repairs_and_is_content_in_the_end(depot: Depot) -> None:
    digests = depot.fill()
    # Given nothing wrong: status 0, a table for each participant
    done = depot.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines() if not line.startswith("participant")] == [
        ["index", "8"], ["blob", "8"],
    ]  # fmt: skip
    # Given a document lost and a blob damaged: status 1, and JSON that says so
    depot.damage_index()
    depot.damage_blob(digests[3])
    done = depot.run("--json")
    assert done.returncode == 1
    index, blob = json.loads(done.stdout)
    assert (index["participant"], index["found"], index["counts"], index["items"]) == ("index", 1, {"missing": 1}, 8)
    assert [(each["kind"], each["key"]) for each in blob["findings"]] == [("corrupt", digests[3])]
    # Asked to repair where nobody can agree, it prints the plan and does nothing
    for words in (["--repair"], ["--repair", "--dry-run"]):
        done = depot.run("index", *words)
        assert done.returncode == 1
        assert "put again" in done.stderr
    assert depot.site.one("select count(*) from outbox.log where headers is not null") == 0
    # Agreed to, it does
    done = depot.run("--repair", "--yes")
    assert done.returncode == 0, done.stderr
    assert "1 intent was written to repair index" in done.stdout
    depot.drain()
    assert depot.run().returncode == 0
    assert depot.store.verify(digests[3])
    assert set(depot.states()) == {"done"}
    # And what it found is to be seen in the status, until then
    status = subprocess.run(
        [sys.executable, "-m", "outbox", "status", "--json"], env=depot.environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    scrubs = json.loads(status.stdout)["scrubs"]
    assert {each["target"]: each["found"] for each in scrubs} == {"index": 0, "blob": 0}


@pytest.mark.parametrize("name", POINTS)
def test_scrub_i11_is_taken_up_again_when_it_was_killed(depot: Depot, name: str) -> None:
    # Given damage to a blob, and a scrub with its repair that is killed
    digests = depot.fill()
    depot.damage_blob(digests[3])
    # The first save is before anything was compared
    at = f"{name}:2" if name == "scrub.saved" else name
    killed = depot.run("blob", "--repair", "--yes", OUTBOX_FAILPOINT=at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert depot.states() == ["running"]
    # When the same is asked for again, it goes on
    done = depot.run("blob", "--repair", "--yes")
    assert done.returncode == 0, done.stderr
    assert "it goes on" in done.stderr
    assert depot.states() == ["done"]
    # Then the blob is repaired, once, and nothing was destroyed
    depot.drain()
    assert depot.store.verify(digests[3])
    assert [path.read_bytes() for path in (depot.site.home / "blobs" / "aside").iterdir()] == [b"!"]
    repeated = "select count(*) from outbox.log where outbox.repeats(headers) is not null"
    assert depot.site.one(repeated) == 1
    assert depot.run("blob").returncode == 0


def test_scrub_can_be_stopped_and_resumed_when_it_is_in_the_way(depot: Depot) -> None:
    depot.fill()
    depot.damage_index()
    # Given a scrub that would take long
    process = subprocess.Popen(
        # What a shell's background job starts has inherited that it can't be interrupted.
        ["env", "--default-signal=INT", sys.executable, "-m", "outbox", "scrub", "index", "--rate", "0.01"],
        env=depot.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: depot.site.one("select progress ? 'tick' from outbox.operation"), "it compares")
    # A shell's background jobs ignore the one.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
    _, said = process.communicate(timeout=LIMIT)
    # When it is told to stop, it says how to go on
    number = depot.site.one("select id from outbox.operation")
    assert process.returncode == 130
    assert f"outbox scrub --resume {number}" in said
    done = depot.run("--resume", str(number))
    assert done.returncode == 1, done.stderr
    assert "note/2" in done.stdout
    assert depot.states() == ["done"]


def test_scrub_says_which_role_it_needs(depot: Depot, app_url: str) -> None:
    done = depot.run("index", OUTBOX_DATABASE=app_url)
    assert (done.returncode, "outbox_operator" in done.stderr) == (1, True), done.stderr


def test_scrub_has_ended_when_nobody_reads_what_it_prints(depot: Depot) -> None:
    depot.fill()
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "outbox", "scrub", "index"], env=depot.environment, stdout=write, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.close(write)
    _, said = process.communicate(timeout=2 * LIMIT)
    assert (process.returncode, said) == (1, "")
    assert depot.states() == ["done"]


def test_scrub_refuses_what_it_cannot_compare(depot: Depot) -> None:
    for words, why in {
        ("nobody",): "nothing installed is a participant",
        ("saga",): "keeps everything in the database",
        ("mail",): "nothing to compare",
        ("--scheduled",): "OUTBOX_SCRUB_EVERY is not set",
        ("--scheduled", "--repair"): "leave the other option out",
        ("--resume", "99"): "must name a scrub",
        ("--participant", "json:loads"): "name it before",
    }.items():
        done = depot.run(*words)
        assert done.returncode == 1
        assert why in done.stderr, words
    assert depot.states() == []


def test_scrub_lists_and_repairs_as_many_as_it_is_told_to(depot: Depot) -> None:
    digests = depot.fill()
    for digest in digests[:3]:
        depot.damage_blob(digest)
    # When one is to be listed, then the others are counted, and how to have them listed is said
    done = depot.run("blob", "--list", "1")
    assert done.returncode == 1
    assert "and 2 more" in done.stdout
    assert "--list 3" in done.stdout
    # ... and only that one is repaired
    done = depot.run("blob", "--list", "1", "--repair", "--yes")
    assert (done.returncode, "Only those that are listed" in done.stderr) == (1, True)
    depot.drain()
    # When all are, then all are
    done = depot.run("blob", "--list", "2", "--json")
    assert len(json.loads(done.stdout)[0]["findings"]) == 2
    assert depot.run("blob", "--list", "3", "--repair", "--yes").returncode == 0
    depot.drain()
    assert depot.run("blob").returncode == 0


def test_scrub_says_what_to_do_when_the_index_is_gone(depot: Depot) -> None:
    depot.fill()
    shutil.rmtree(depot.site.home / "index")
    # Without a worker
    done = depot.run("index")
    assert (done.returncode, "start its worker" in done.stderr) == (1, True), done.stderr
    # With one that doesn't know yet
    claimed = (
        "update outbox.lane set owner = gen_random_uuid(), lease_until = now() + interval '1 h' where target = 'index'"
    )
    depot.site.admin.execute(claimed)
    done = depot.run("index")
    assert (done.returncode, "restart the worker" in done.stderr) == (1, True), done.stderr
    assert depot.states() == []


def test_scrub_goes_through_the_others_when_one_can_not_be_compared(depot: Depot) -> None:
    digests = depot.fill()
    depot.damage_blob(digests[0])
    shutil.rmtree(depot.site.home / "index")
    done = depot.run("--json")
    assert done.returncode == 1
    index, blob = json.loads(done.stdout)
    assert "there is no index" in index["error"]
    assert [each["key"] for each in blob["findings"]] == [digests[0]]
    # ... and a store that isn't there is not one that has lost everything
    (depot.site.home / "blobs").rename(depot.site.home / "unmounted")
    done = depot.run("blob")
    assert (done.returncode, "there is no store" in done.stderr) == (1, True)


def test_scrub_says_what_to_do_when_there_is_no_room(depot: Depot) -> None:
    # Given a damaged blob whose right bytes are in the trash, and a store that nothing can be staged in
    depot.drain()
    with depot.site.admin.transaction():
        xid, log = (
            depot.site.one("select pg_current_xact_id()::text::bigint"),
            depot.site.one("select log from outbox.identity"),
        )
        staged = depot.store.stage(b"content", xid=xid, log=log)
        depot.site.admin.execute(
            "select outbox.emit('blob', 'put', %s, %s)", (staged.digest, json.dumps(staged.payload()))
        )
    depot.drain()
    blobs = depot.site.home / "blobs"
    (blobs / "trash").mkdir(exist_ok=True)
    (blobs / "trash" / f"1-1-{staged.digest}").write_bytes(b"content")
    depot.damage_blob(staged.digest)
    (blobs / "staging").rename(blobs / "elsewhere")
    (blobs / "staging").write_text("no folder")
    # When it is repaired, then it stops instead of saying that nobody has the bytes
    done = depot.run("blob", "--repair", "--yes")
    assert done.returncode == 1
    assert "outbox scrub: the blob store can't be written" in done.stderr
    assert depot.states() == ["running"]
    # When there is room, then it goes on
    (blobs / "staging").unlink()
    (blobs / "elsewhere").rename(blobs / "staging")
    done = depot.run("blob", "--repair", "--yes")
    assert done.returncode == 0, done.stderr
    depot.drain()
    assert depot.store.verify(staged.digest)


def test_scrub_lets_go_when_its_list_has_no_room(depot: Depot, tmp_path: Path) -> None:
    depot.fill()
    # Given a temporary directory that can't take the list
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    limited += "sys.argv = ['outbox', 'scrub', 'index']; runpy.run_module('outbox', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limited], env=depot.environment, check=False, capture_output=True, text=True,
        timeout=2 * LIMIT,
    )  # fmt: skip
    # Then it says so, and nothing else, and the same command goes on at once
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        "Not finished; go on with", "outbox scrub",
    ], done.stderr  # fmt: skip
    assert depot.site.one("select owner is null and state = 'running' from outbox.operation")


def test_scrub_runs_by_its_schedule_and_stops_when_it_is_told_to(depot: Depot) -> None:
    depot.fill()
    depot.damage_index()
    process = subprocess.Popen(
        [sys.executable, "-m", "outbox", "scrub", "--scheduled"],
        env=depot.site.environment | {"OUTBOX_SCRUB_EVERY": "1h", "OUTBOX_MAIL_EVIDENCE": "none"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # Then each participant is scrubbed once, and the status warns of what was found
        until(lambda: depot.states() == ["done", "done"], "both were scrubbed")
    finally:
        process.terminate()
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    status = subprocess.run(
        [sys.executable, "-m", "outbox", "status"], env=depot.environment, capture_output=True, text=True, check=True
    )
    assert "! the last scrub of index left 1 finding:" in status.stdout
    assert "overdue" not in status.stdout
    # ... and when the next ones don't come, it says so
    depot.site.admin.execute("update outbox.operation set started_at = started_at - interval '3 hours'")
    status = subprocess.run(
        [sys.executable, "-m", "outbox", "status"], env=depot.environment, capture_output=True, text=True, check=True
    )
    assert "! a scrub of blob is overdue" in status.stdout
