"""Scrub of a real blob store, a directory or a bucket, that was damaged: each kind is found, repaired, and gone."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from outbox.blob import BlobStore
from outbox.s3 import S3Store
from tests.fixtures.scrub import Yard, kinds

LARGE = 300_000


def _path(yard: Yard, digest: str) -> Path:
    assert isinstance(yard.store, BlobStore)
    return yard.store.path(digest)


def _overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o640)
    path.write_bytes(content)


def _aside(yard: Yard) -> list[bytes]:
    return sorted(path.read_bytes() for path in (yard.home / "blobs" / "aside").iterdir())


def test_scrub_i2_is_clean_when_the_store_holds_what_the_log_says(yard: Yard) -> None:
    kept, gone = yard.blob(os.urandom(LARGE)), yard.blob(b"to be deleted")
    yard.blob(b"")
    yard.drain()
    yard.delete("blob", gone)
    yard.drain()
    progress = yard.survey("blob")
    assert (progress.found, progress.items, progress.bytes) == (0, 2, LARGE)
    assert yard.store.verify(kept)
    # ... also while a blob is staged, or committed and not published
    yard.blob(b"committed")
    yard.bench.clock.step()
    assert yard.survey("blob").found == 0


def test_scrub_i9_finds_all_damage_to_files_and_repairs_what_it_has_the_bytes_of(yard: Yard) -> None:
    contents = [os.urandom(LARGE) for _ in range(6)]
    flipped, cut, lost, folder, emptied, well = (yard.blob(content) for content in contents)
    orphan = yard.blob(b"deleted by the log")
    yard.drain()
    # Given the trash of a day, in which some blobs lie because they were deleted before and stored again
    for digest in (flipped, cut, lost, folder):
        yard.delete("blob", digest)
    yard.delete("blob", orphan)
    yard.drain()
    for content in contents[:4]:
        yard.blob(content)
    yard.drain()
    # Given flipped bits, a file cut short, a deleted one, something else in its place, an emptied one, one that was
    # deleted and is back, one that no log ever heard of, and a file that is no blob
    wrong = bytearray(contents[0])
    wrong[77] ^= 4
    _overwrite(_path(yard, flipped), bytes(wrong))
    _overwrite(_path(yard, cut), contents[1][:1000])
    _path(yard, lost).unlink()
    _path(yard, folder).unlink()
    _path(yard, folder).mkdir()
    _overwrite(_path(yard, emptied), b"")
    for content in (b"deleted by the log", b"foreign"):
        path = _path(yard, hashlib.sha256(content).hexdigest())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (yard.home / "blobs" / "objects" / "notes.txt").write_text("mine")
    # When it is scrubbed, all of it is found
    foreign = hashlib.sha256(b"foreign").hexdigest()
    expected = {
        flipped: "corrupt", cut: "corrupt", lost: "missing", folder: "missing", emptied: "corrupt",
        orphan: "orphaned", foreign: "orphaned", "notes.txt": "orphaned",
    }  # fmt: skip
    assert {key: kind for kind, key in yard.found("blob")} == expected
    # When it is repaired
    progress = yard.repair("blob")
    # Then what the trash has the bytes of is right again, and the orphans are gone
    assert progress.emitted == 6
    assert all(yard.store.verify(digest) for digest in (flipped, cut, lost, folder, well))
    assert not yard.store.exists(orphan)
    assert not yard.store.exists(foreign)
    # The damaged ones were not destroyed, nor was the only copy of what the log never heard of
    aside = yard.home / "blobs" / "aside"
    assert sorted(path.read_bytes() for path in aside.iterdir() if path.is_file()) == sorted(
        [bytes(wrong), contents[1][:1000], b"foreign"]
    )
    assert [path.name[:64] for path in aside.iterdir() if path.is_dir()] == [folder]
    # And what nobody has the bytes of stays as it was, and is told with the command that fetches them
    left = {each.key: each.advice for each in progress.findings if not each.repair}
    assert left.keys() == {"notes.txt", emptied}
    assert "resilver blob --from" in left[emptied]
    assert "move it away" in left["notes.txt"]
    assert _path(yard, emptied).read_bytes() == b""
    assert {key for _, key in yard.found("blob")} == {"notes.txt", emptied}


def test_scrub_repairs_a_small_blob_from_its_intent_when_it_travelled_there(yard: Yard) -> None:
    # Given a blob whose bytes are in the log
    content = b"a setting"
    digest = hashlib.sha256(content).hexdigest()
    yard._emit("blob", "put", digest, {"digest": digest, "size": 9, "bytes": "YSBzZXR0aW5n"})
    yard.drain()
    _overwrite(_path(yard, digest), b"A setting")
    progress = yard.repair("blob")
    assert (kinds(progress), progress.emitted) == ([("corrupt", digest)], 1)
    assert yard.store.verify(digest)
    assert _aside(yard) == [b"A setting"]
    assert yard.found("blob") == []


def test_scrub_calls_it_corrupt_when_the_disk_does_not_give_a_blob_back(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = yard.blob(b"content")
    yard.drain()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("workers.scrub.blob.BlobSubject._hash", broken)
    assert yard.found("blob") == [("corrupt", digest)]


def test_scrub_i9_finds_and_repairs_damage_to_a_bucket(yard: Yard, s3: S3Store) -> None:
    yard.store = s3
    contents = [os.urandom(20_000) for _ in range(5)]
    flipped, cut, lost, replaced, well = (yard.blob(content) for content in contents)
    orphan = yard.blob(b"deleted by the log")
    yard.drain()
    for digest in (flipped, cut, orphan):
        yard.delete("blob", digest)
    yard.drain()
    for content in contents[:2]:
        yard.blob(content)
    yard.drain()
    bucket = s3.bucket

    def newest(digest: str) -> str:
        found = s3.newest(digest)
        assert found is not None
        return found.key

    # Given flipped bits, an object cut short, all versions of a blob deleted, a wrong one above a right one, orphans
    # of both kinds, and an object that is no blob
    bucket.put(newest(flipped), contents[0][:-1] + bytes([contents[0][-1] ^ 1]))
    bucket.put(newest(cut), contents[1][:100])
    bucket.delete([newest(lost)])
    bucket.put(f"objects/{replaced[:2]}/{replaced}/9999999998-0000000001", b"x" * 20_000)
    bucket.put(f"objects/{orphan[:2]}/{orphan}/9999999998-0000000001", b"deleted by the log")
    foreign = hashlib.sha256(b"foreign").hexdigest()
    bucket.put(f"objects/{foreign[:2]}/{foreign}/0000000001-0000000001", b"foreign")
    bucket.put("objects/notes.txt", b"mine")
    expected = {
        flipped: "corrupt", cut: "corrupt", lost: "missing", replaced: "corrupt", orphan: "orphaned",
        foreign: "orphaned", "notes.txt": "orphaned",
    }  # fmt: skip
    assert {key: kind for kind, key in yard.found("blob")} == expected
    # When it is repaired
    yard.bench.admin.execute("update outbox.lane set epoch = 9999999998 where target = 'blob'")
    progress = yard.repair("blob")
    # Then what an older version has the bytes of is right again; what nobody has stays told
    assert progress.emitted == 5
    assert {each.key for each in progress.findings if not each.repair} == {lost, "notes.txt"}
    assert all(s3.verify(digest) for digest in (flipped, cut, replaced, well))
    assert not s3.exists(orphan)
    assert not s3.exists(foreign)
    assert {entry.size for entry in bucket.list("aside/")} == {20_000, 100, 7}
    assert {key for _, key in yard.found("blob")} == {lost, "notes.txt"}
