"""The blob store by itself: staging, publishing, reading; and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from outbox.blob import Blob, BlobMissing, BlobStore, Staged
from outbox.errors import BlobRefused, OutboxError
from outbox.participant import LaneView
from outbox.source import CHUNK
from workers.publication import DirectoryPublisher, Publication

LOG = "0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def stage(store: BlobStore, content: Any = b"content", **options: Any) -> Staged:
    return store.stage(content, xid=7, log=LOG, **options)


def publish(store: BlobStore, *batch: Staged) -> None:
    with Publication(store) as publication:
        for staged in batch:
            publication.put(staged)
        publication.sync()


def staging(store: BlobStore) -> list[str]:
    return os.listdir(store.directory / "staging")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_stage_keeps_every_byte_whatever_the_source(store: BlobStore, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = tmp_path / "source"
    path.write_bytes(content)
    link = tmp_path / "link"
    link.symlink_to(path)  # a user's own path may be one
    for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), path, str(link)):
        staged = stage(store, source, size=size, limit=size)
        assert (staged.digest, staged.size) == (hashlib.sha256(content).hexdigest(), size)
        publish(store, staged)
        with store.open(staged.digest) as file:
            assert file.read() == content


def test_stage_takes_a_file_from_where_it_stands_and_leaves_it_open(store: BlobStore) -> None:
    source = io.BytesIO(b"head and tail")
    source.read(9)
    assert stage(store, source).digest == hashlib.sha256(b"tail").hexdigest()
    assert not source.closed


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        (b"four", {"size": 3}, "longer than the declared 3"),
        (b"four", {"size": 5}, "ended after 4 of the declared 5"),
        (b"four", {"limit": 3}, "over the limit of 3"),
        (b"four", {"size": 4, "limit": 3}, "declared with 4 bytes, the limit is 3"),
        (io.StringIO("four"), {}, "binary"),
        ("/nonexistent/file", {}, "can't be read"),
        ("/etc", {}, "plain file"),
        ("/dev/zero", {}, "plain file"),
    ],
)
def test_stage_refuses_and_leaves_nothing(store: BlobStore, content: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(BlobRefused, match=text):
        stage(store, content, **options)
    assert not (store.directory / "staging").exists() or staging(store) == []


def test_stage_refuses_a_pipe_without_waiting_for_it(store: BlobStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BlobRefused, match="plain file"):
        stage(store, tmp_path / "pipe")


class Breaking(io.RawIOBase):
    """A source that fails in its middle."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.reads = 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads == 3:
            raise self.error
        return b"x" * size


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(errno.EIO, "text"), BlobRefused), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_stage_leaves_nothing_when_its_source_breaks(
    store: BlobStore, error: BaseException, expected: type[BaseException]
) -> None:
    with pytest.raises(expected):
        stage(store, Breaking(error))
    assert staging(store) == []


@pytest.mark.parametrize(("xid", "log"), [(0, LOG), (-1, LOG), (7, "../../etc/passwd"), (7, "")])
def test_stage_refuses_names_of_another_shape(store: BlobStore, xid: int, log: str) -> None:
    with pytest.raises(ValueError, match="log or xid"):
        store.stage(b"x", xid=xid, log=log)


def test_stage_never_repeats_a_failed_fsync(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.make()
    calls = []

    def fsync(file: int) -> None:
        calls.append(file)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(BlobRefused, match="Input/output error"):
        stage(store)
    assert len(calls) == 1
    assert staging(store) == []


@pytest.mark.root
def test_stage_says_that_there_is_no_room(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], check=True)
    try:
        store = BlobStore(tmp_path / "blobs")
        small = stage(store, b"small")
        with pytest.raises(BlobRefused, match="no room"):
            stage(store, b"x" * 3 * CHUNK)
        assert staging(store) == [small.stage]
        publish(store, small)  # what was staged before is not touched
        assert store.verify(small.digest)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_stage_needs_constant_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(CHUNK))
    program = f"""
from outbox.blob import BlobStore

def peak():
    # Not ru_maxrss: that one is inherited from the process that started this one.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

store = BlobStore({str(tmp_path / "blobs")!r})
store.stage(b"first", xid=7, log={LOG!r})
before = peak()
store.stage({str(source)!r}, xid=7, log={LOG!r})
store.stage(open({str(source)!r}, "rb"), xid=7, log={LOG!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 32 * 1024  # KiB; it was 64 MiB, twice


def test_published_blobs_are_read_only_and_listed(store: BlobStore) -> None:
    first, second, unseen = stage(store, b"one"), stage(store, b"two two"), stage(store, b"unpublished")
    publish(store, first, second)
    assert set(store.inventory()) == {Blob(first.digest, 3), Blob(second.digest, 7)}
    assert store.path(first.digest).stat().st_mode & 0o777 == 0o440
    assert (store.size(first.digest), store.exists(unseen.digest)) == (3, False)
    with pytest.raises(BlobMissing, match="no blob"):
        store.open(unseen.digest)


@pytest.mark.parametrize("digest", ["", "../../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_nothing_but_a_digest_becomes_a_path(store: BlobStore, digest: str) -> None:
    for method in (store.open, store.path, store.exists, store.size, store.verify):
        with pytest.raises(BlobRefused, match="digest"):
            method(digest)


def test_verify_finds_a_flipped_byte(store: BlobStore) -> None:
    staged = stage(store, b"content")
    publish(store, staged)
    assert store.verify(staged.digest)
    path = store.path(staged.digest)
    path.chmod(0o600)
    path.write_bytes(b"c0ntent")
    assert not store.verify(staged.digest)


def test_symbolic_links_in_the_store_are_not_followed(store: BlobStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    store.make()
    # A link as an object, as a folder of objects, as a staged file, as the staging folder.
    store.path(digest).parent.mkdir()
    store.path(digest).symlink_to(outside)
    with pytest.raises(BlobMissing):
        store.open(digest)
    assert not store.exists(digest)
    assert list(store.inventory()) == []

    other = "ff" + "0" * 62
    (tmp_path / other).write_bytes(b"secret")
    (store.directory / "objects" / "ff").symlink_to(tmp_path)
    with pytest.raises(BlobMissing):
        store.open(other)

    planted = f"{LOG}-7-{'0' * 32}"
    (store.directory / "staging" / planted).symlink_to(outside)
    with pytest.raises(BlobRefused, match="not the one that was staged"):
        publish(store, Staged("ab" * 32, 6, planted))
    assert store.remove_stage(planted)
    assert outside.read_bytes() == b"secret"

    (store.directory / "staging").rmdir()
    (store.directory / "staging").symlink_to(tmp_path)
    with pytest.raises(BlobRefused):
        stage(store)


@pytest.mark.parametrize("place", ["staging", "objects", "objects/ed", "trash", "lanes", "lanes/blob-0"])
def test_links_planted_in_the_store_lead_nowhere(store: BlobStore, tmp_path: Path, place: str) -> None:
    # Given: a published blob, a staged one, and a link out of the store in the place of one of its folders or files
    published, staged = stage(store, b"content"), stage(store, b"other")
    publish(store, published)
    assert published.digest.startswith("ed")
    store.directory.joinpath(place).parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        store.directory.joinpath(place).rename(tmp_path / "moved")
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (published.digest, staged.digest, staged.stage, "blob-0", "ed"):
        (outside / name).write_bytes(b"outside")
    target = outside / "blob-0" if place == "lanes/blob-0" else outside
    store.directory.joinpath(place).symlink_to(target)
    before = {path.name: (path.read_bytes(), path.stat().st_nlink) for path in outside.iterdir()}

    # When: everything is tried that opens, makes, links, renames or removes
    def delete() -> None:
        with Publication(store) as publication:
            publication.delete(published.digest, epoch=1, id=5)

    for attempt in (
        lambda: stage(store),
        lambda: publish(store, staged),
        lambda: publish(store, published),
        delete,
        lambda: store.open(published.digest).close(),
        lambda: list(store.inventory()),
        lambda: list(store.stages()),
        lambda: store.remove_stage(staged.stage),
        lambda: store.purge_trash(0),
        lambda: DirectoryPublisher(store, LaneView("blob", 0, 7, unclean=False)).close(),
    ):
        with suppress(OSError, OutboxError):
            attempt()
    # Then: nothing outside has changed, nor got another name
    assert {path.name: (path.read_bytes(), path.stat().st_nlink) for path in outside.iterdir()} == before


def test_a_link_in_the_place_of_an_object_is_replaced_by_the_blob(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"outside")
    staged = stage(store, b"content")
    store.path(staged.digest).parent.mkdir()
    store.path(staged.digest).symlink_to(tmp_path / "outside")
    publish(store, staged)
    assert store.verify(staged.digest)
    assert (tmp_path / "outside").read_bytes() == b"outside"


def test_stages_tells_whose_they_are_and_passes_over_other_names(store: BlobStore) -> None:
    staged = stage(store)
    for name in ("README", f"{LOG}-x-{'0' * 32}", f"{LOG}-{'9' * 20}-{'0' * 32}"):
        (store.directory / "staging" / name).touch()
    assert [tuple(found) for found in store.stages()] == [(staged.stage, LOG, 7)]
    assert store.remove_stage(staged.stage)
    assert not store.remove_stage(staged.stage)
    for name in ("README", "../trash/x", ""):
        with pytest.raises(ValueError, match="name of a staged file"):
            store.remove_stage(name)


def test_deleting_again_under_the_same_name_does_delete(store: BlobStore) -> None:
    # rename() between two names of one file does nothing: the trash of an earlier try must not stop it.
    staged = stage(store)
    for _ in range(2):
        publish(store, staged)
        with Publication(store) as publication:
            publication.delete(staged.digest, epoch=1, id=5)
            publication.sync()
        assert not store.exists(staged.digest)
    assert os.listdir(store.directory / "trash") == [f"1-5-{staged.digest}"]
    assert store.purge_trash(60) == 0
    assert store.purge_trash(0) == 1


def test_payload_names_the_stage_and_the_metadata(store: BlobStore) -> None:
    staged = stage(store)
    assert staged.payload(name="a.pdf", type="application/pdf") == {
        "digest": staged.digest, "size": 7, "stage": staged.stage, "name": "a.pdf", "type": "application/pdf"
    }  # fmt: skip
