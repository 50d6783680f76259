"""The participant `blob` against a real file system: order of writes, kills, faults, fences."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from outbox.blob import BlobStore, Inline, Staged
from outbox.errors import Fenced, Unavailable
from outbox.intent import Intent
from outbox.participant import Doubt, Evidence, Item, LaneView, Participant, Verdict
from workers import publication
from workers.blob import BlobParticipant

LOG = "0123456789abcdef"

APPLIED, POISON, BLOCKED = Verdict.APPLIED, Verdict.POISON, Verdict.BLOCKED


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def participant(store: BlobStore) -> Iterator[BlobParticipant]:
    participant = opened(store)
    yield participant
    participant.close()


def opened(store: BlobStore, epoch: int = 1) -> BlobParticipant:
    participant = BlobParticipant(store)
    participant.open(LaneView("blob", 0, epoch, unclean=False))
    return participant


def stage(store: BlobStore, content: bytes = b"content") -> Staged:
    return store.stage(content, xid=7, log=LOG)


def put(id_: int, staged: Staged, **changes: Any) -> Intent:
    return Intent.make("blob", "put", staged.digest, {**staged.payload(), **changes})._replace(id=id_)


def delete(id_: int, digest: str) -> Intent:
    return Intent.make("blob", "delete", digest, {})._replace(id=id_)


def verdicts(participant: BlobParticipant, *batch: Intent) -> list[Verdict]:
    return [outcome.verdict for outcome in participant.apply(batch, None)]


def stages(store: BlobStore) -> set[str]:
    return {found.name for found in store.stages()}


# ------------------------------------------------------------------------------------- what it does


def test_blob_publishes_once_however_often_it_is_applied(store: BlobStore, participant: BlobParticipant) -> None:
    protocol: Participant = participant  # mypy checks the rest of it
    assert isinstance(protocol, Participant)
    first, second = stage(store, b"one"), stage(store, b"two")
    batch = [put(1, first), put(2, second)]
    for _ in range(3):  # replay after a crash before the position was stored
        assert verdicts(participant, *batch) == [APPLIED, APPLIED]
    assert stages(store) == {first.stage, second.stage}
    participant.settle(batch)
    assert stages(store) == set()
    assert verdicts(participant, *batch) == [APPLIED, APPLIED]  # replay after a crash behind it
    assert set(participant.inventory()) == {Item(s.digest, s.digest, 0) for s in (first, second)}


def test_blob_stages_of_the_same_bytes_become_one_object(store: BlobStore, participant: BlobParticipant) -> None:
    staged = [stage(store) for _ in range(3)]
    batch = [put(n, s) for n, s in enumerate(staged, 1)]
    assert verdicts(participant, *batch) == [APPLIED] * 3
    participant.settle(batch)
    assert [b.digest for b in store.inventory()] == [staged[0].digest]
    assert stages(store) == set()


def test_blob_deleted_can_be_put_again(store: BlobStore, participant: BlobParticipant) -> None:
    first, second = stage(store), stage(store)
    digest = first.digest
    assert verdicts(participant, put(1, first), delete(2, digest)) == [APPLIED, APPLIED]
    assert not store.exists(digest)
    assert os.listdir(store.directory / "trash") == [f"1-2-{digest}"]
    assert verdicts(participant, delete(2, digest)) == [APPLIED]
    assert verdicts(participant, put(3, second)) == [APPLIED]
    assert store.verify(digest)
    # The whole batch again, by another owner, ends the same.
    again = opened(store, epoch=2)
    assert verdicts(again, put(1, first), delete(2, digest), put(3, second)) == [APPLIED] * 3
    assert store.verify(digest)
    again.close()


def test_blob_delete_of_what_is_open_does_not_disturb_its_reader(
    store: BlobStore, participant: BlobParticipant
) -> None:
    staged = stage(store)
    verdicts(participant, put(1, staged))
    with store.open(staged.digest) as file:
        verdicts(participant, delete(2, staged.digest))
        store.purge_trash(0)
        assert file.read() == b"content"


def test_blob_damaged_object_of_another_size_is_replaced(store: BlobStore, participant: BlobParticipant) -> None:
    staged = stage(store)
    store.path(staged.digest).parent.mkdir()
    store.path(staged.digest).write_bytes(b"cont")
    assert verdicts(participant, put(1, staged)) == [APPLIED]
    assert store.verify(staged.digest)


def test_blob_without_stage_and_object_is_poison_and_blocks_its_key(
    store: BlobStore, participant: BlobParticipant
) -> None:
    lost, other = stage(store, b"lost"), stage(store, b"other")
    again = stage(store, b"lost")
    store.remove_stage(lost.stage)
    batch = [put(1, lost), put(2, other), put(3, again), delete(4, lost.digest)]
    outcomes = participant.apply(batch, None)
    assert [o.verdict for o in outcomes] == [POISON, APPLIED, BLOCKED, BLOCKED]
    assert "staged file is gone" in outcomes[0].error
    # What is parked needs its stage later on.
    participant.settle(batch)
    assert stages(store) == {again.stage}
    assert verdicts(participant, put(3, again)) == [APPLIED]


def test_blob_stage_of_another_size_is_poison(store: BlobStore, participant: BlobParticipant) -> None:
    staged = stage(store)
    assert verdicts(participant, put(1, staged, size=6)) == [POISON]
    assert list(store.inventory()) == []


@pytest.mark.parametrize(
    "body",
    ["{}", "[]", "1e5000", "[" * 1200 + "]" * 1200, '{"digest": "../x", "size": 1, "stage": "y"}',
     '{"digest": "%s", "size": true, "stage": "%s"}', '{"digest": "%s", "size": -1, "stage": "%s"}',
     '{"digest": "%s", "size": 7, "stage": null, "bytes": "Y29udGVudA"}', '{"digest": "%s", "size": 7, "bytes": 7}',
     '{"digest": "%s", "size": 7, "bytes": "Y29udGVuZA=="}', '{"digest": "%s", "size": 6, "bytes": "Y29udGVudA=="}',
     '{"digest": "%s", "size": "7", "stage": "%s"}', '{"digest": "%s", "size": 7, "stage": "../objects/x"}'],
)  # fmt: skip
def test_blob_malformed_payload_is_poison(store: BlobStore, participant: BlobParticipant, body: str) -> None:
    staged = stage(store)
    if "%s" in body:
        body = body.replace("%s", staged.digest, 1).replace("%s", staged.stage)
    outcomes = participant.apply([put(1, staged)._replace(body=body)], None)
    assert outcomes[0].verdict is POISON
    assert staged.digest not in outcomes[0].error


def test_blob_bytes_in_the_intent_are_published_without_a_stage(store: BlobStore, participant: BlobParticipant) -> None:
    # Given: small bytes as the session writes them, and as SQL does, with line ends
    content = os.urandom(1000)
    digest = hashlib.sha256(content).hexdigest()
    lines = base64.encodebytes(content).decode()
    inline = Intent.make("blob", "put", digest, Inline(digest, 1000, content).payload())._replace(id=1)
    by_hand = Intent.make("blob", "put", digest, {"digest": digest, "size": 1000, "bytes": lines})._replace(id=2)
    # When: they are applied, again, in the place of a damaged blob, and after a delete
    for _ in range(2):
        assert verdicts(participant, inline) == [APPLIED]
        assert store.verify(digest)
    store.path(digest).unlink()
    store.path(digest).write_bytes(b"damaged")
    assert verdicts(participant, by_hand) == [APPLIED]
    assert store.verify(digest)
    batch = [delete(3, digest), by_hand]
    assert verdicts(participant, *batch) == [APPLIED, APPLIED]
    participant.settle(batch)
    # Then: they are a blob like any other
    assert store.verify(digest)
    assert store.path(digest).stat().st_mode & 0o777 == 0o440
    assert stages(store) == set()
    assert os.listdir(store.directory / "trash") == [f"1-3-{digest}"]


def test_blob_intent_of_another_key_or_action_is_poison(store: BlobStore, participant: BlobParticipant) -> None:
    staged = stage(store)
    assert verdicts(participant, put(1, staged)._replace(key="a name")) == [POISON]
    assert verdicts(participant, delete(1, "../../etc/passwd")) == [POISON]
    assert verdicts(participant, put(1, staged)._replace(action="send")) == [POISON]


def test_blob_probe_looks(store: BlobStore, participant: BlobParticipant) -> None:
    there, absent = stage(store, b"there"), stage(store, b"absent")
    verdicts(participant, put(1, there))
    asked = [put(1, there), put(2, absent), delete(3, there.digest), delete(4, absent.digest), delete(5, "x")]
    doubts = [Doubt(intent, datetime.now(UTC), {}) for intent in asked]
    assert [evidence for evidence, _ in participant.probe(doubts)] == [
        Evidence.APPLIED, Evidence.NOT_APPLIED, Evidence.NOT_APPLIED, Evidence.APPLIED, Evidence.NOT_APPLIED
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- faults


def test_blob_waits_when_a_folder_cannot_be_synced_and_starts_anew(
    store: BlobStore, participant: BlobParticipant, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, old = stage(store), stage(store, b"old")
    verdicts(participant, put(1, old))
    fsync = os.fsync

    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    (store.directory / "objects" / staged.digest[:2]).mkdir()
    with pytest.raises(Unavailable, match="Input/output error"):
        participant.apply([put(2, staged), delete(3, old.digest)], None)
    # Undone: the next try changes the folders again, and doesn't merely repeat the fsync.
    assert not store.exists(staged.digest)
    assert store.exists(old.digest)
    monkeypatch.setattr(os, "fsync", fsync)
    assert verdicts(participant, put(2, staged), delete(3, old.digest)) == [APPLIED, APPLIED]
    assert (store.exists(staged.digest), store.exists(old.digest)) == (True, False)


@pytest.mark.root
def test_blob_waits_while_its_file_system_is_full(tmp_path: Path) -> None:
    # A hard link takes an inode of tmpfs: the way to fill a file system for links alone.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=100", "tmpfs", tmp_path], check=True)
    try:
        store = BlobStore(tmp_path / "blobs")
        participant = opened(store)
        staged = stage(store)
        fillers = []
        with suppress(OSError):
            for n in range(100):
                (tmp_path / f"filler{n}").touch()
                fillers.append(tmp_path / f"filler{n}")
        with pytest.raises(Unavailable, match="No space"):
            participant.apply([put(1, staged)], None)
        for filler in fillers:
            filler.unlink()
        assert verdicts(participant, put(1, staged)) == [APPLIED]
        participant.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("where", ["objects", "staging"])
def test_blob_waits_while_its_folders_are_missing(store: BlobStore, participant: BlobParticipant, where: str) -> None:
    staged = stage(store)
    (store.directory / where).rename(store.directory / "elsewhere")
    with pytest.raises(Unavailable):
        participant.apply([put(1, staged)], None)
    (store.directory / "elsewhere").rename(store.directory / where)
    assert verdicts(participant, put(1, staged)) == [APPLIED]


# ------------------------------------------------------------------------------------------- fences


def test_blob_i6_owner_of_a_stale_epoch_changes_nothing(store: BlobStore) -> None:
    first, second = stage(store), stage(store)
    old = opened(store, epoch=4)
    new = opened(store, epoch=5)
    new.apply([put(1, first), delete(2, first.digest), put(3, second)], None)
    # The old owner wakes up with the delete in its hand.
    with pytest.raises(Fenced):
        old.apply([delete(2, first.digest)], None)
    assert store.verify(first.digest)
    new.apply([delete(4, first.digest)], None)
    with pytest.raises(Fenced):
        old.apply([put(1, first)], None)
    assert not store.exists(first.digest)
    with pytest.raises(Fenced, match="epoch 5"):
        opened(store, epoch=4)
    old.close()
    new.close()


def test_blob_i6_takeover_waits_for_an_owner_suspended_in_its_links(
    store: BlobStore, participant: BlobParticipant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "LOCK_WAIT", 0.05)
    with (store.directory / "lanes" / "blob-0").open() as suspended:
        fcntl.flock(suspended, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="suspended"):
            opened(store, epoch=2)
    opened(store, epoch=2).close()  # it was ended


# --------------------------------------------------------------------------- order, kills, readers

PROGRAM = """
import sys
from outbox.blob import BlobStore, Staged
from outbox.intent import Intent
from outbox.participant import LaneView
from workers.blob import BlobParticipant

store = BlobStore(sys.argv[1])
participant = BlobParticipant(store)
participant.open(LaneView("blob", 0, int(sys.argv[2]), unclean=False))
staged = store.stage(b"content", xid=7, log="0123456789abcdef")
intent = Intent.make("blob", "put", staged.digest, staged.payload())._replace(id=1)
print(intent.body, flush=True)
print(participant.apply([intent], None)[0].verdict.value, flush=True)
participant.settle([intent])
"""


def test_blob_i5_is_on_disk_before_it_is_reported(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: `make test` as root on Debian does it")
    calls = "openat,mkdirat,write,fsync,linkat,renameat,unlinkat"
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(trace)]
    subprocess.run([*command, sys.executable, "-c", PROGRAM, str(tmp_path / "blobs"), "1"], check=True, timeout=60)
    digest = hashlib.sha256(b"content").hexdigest()
    blobs, stage, prefix = re.escape(str(tmp_path / "blobs")), rf"{LOG}-7-[0-9a-f]{{32}}", digest[:2]
    expected = [
        rf"fsync\(\d+<{blobs}>",
        rf'openat\(.*"{stage}", O_WRONLY\|O_CREAT\|O_EXCL\|O_NOFOLLOW\|O_CLOEXEC, 0440',
        rf'write\(\d+<{blobs}/staging/{stage}>, "content"',
        rf"fsync\(\d+<{blobs}/staging/{stage}>",
        rf"fsync\(\d+<{blobs}/staging>",
        r'write\(1<.*"digest',  # the intent commits here
        rf'mkdirat\(\d+<{blobs}/objects>, "{prefix}"',
        rf"fsync\(\d+<{blobs}/objects>",
        rf'linkat\(\d+<{blobs}/staging>, "{stage}", \d+<{blobs}/objects/{prefix}>, "{digest}", 0\)',
        rf"fsync\(\d+<{blobs}/objects/{prefix}>",
        r'write\(1<.*"applied',  # the position moves here
        rf'unlinkat\(\d+<{blobs}/staging>, "{stage}"',
    ]
    lines = iter(trace.read_text().splitlines())
    for pattern in expected:
        assert any(re.search(pattern, line) for line in lines), f"not there, or too early: {pattern}"


@pytest.mark.parametrize("failpoint", ["blob.linked", "blob.published"])
def test_blob_i3_killed_at_a_failpoint_is_applied_once_by_the_next_owner(store: BlobStore, failpoint: str) -> None:
    env = {**os.environ, "OUTBOX_FAILPOINT": failpoint}
    command = [sys.executable, "-c", PROGRAM, str(store.directory)]
    done = subprocess.run([*command, "1"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL  # I11: it was reached
    [found] = store.stages()
    digest = hashlib.sha256(b"content").hexdigest()
    assert "applied" not in done.stdout
    assert store.exists(digest)
    # The transaction was committed, and the next owner has the intent before him.
    intent = put(1, Staged(digest, 7, found.name))
    participant = opened(store, epoch=2)
    assert verdicts(participant, intent) == [APPLIED]
    participant.settle([intent])
    participant.close()
    assert [b.digest for b in store.inventory()] == [digest]
    assert store.verify(digest)
    assert stages(store) == set()


def test_blob_killed_while_staging_leaves_nothing_that_readers_see(store: BlobStore) -> None:
    program = f"""
import os, signal
from outbox.blob import BlobStore

class Source:
    reads = 0
    def read(self, size):
        self.reads += 1
        if self.reads == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return b"x" * size

BlobStore({str(store.directory)!r}).stage(Source(), xid=7, log={LOG!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert len(stages(store)) == 1  # its transaction can't commit any more: the sweeper's
    assert list(store.inventory()) == []


def test_blob_is_never_seen_in_part(store: BlobStore, participant: BlobParticipant) -> None:
    contents = [os.urandom(2_000_000) for _ in range(12)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    stop, seen, partial = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            for digest in digests:
                if store.exists(digest):
                    seen.add(digest)
                    if not store.verify(digest):
                        partial.append(digest)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number, content in enumerate(contents, 1):
            assert verdicts(participant, put(number, stage(store, content))) == [APPLIED]
    finally:
        stop.set()
        reader.join()
    assert partial == []
    assert seen
