"""The blob store in a bucket, at two real servers: bytes, versions, fences, broken uploads, what endpoints honour."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from outbox import bucket
from outbox.blob import Blob, BlobMissing, Inline, Staged
from outbox.endpoint import Endpoint, probe
from outbox.errors import BlobRefused, Fenced, NotReady, Unavailable
from outbox.intent import Intent
from outbox.participant import LaneView, Verdict
from outbox.s3 import PART, S3Store
from outbox.source import CHUNK
from tests.fixtures.s3 import KINDS, Relay, Server
from workers.blob import BlobParticipant

LOG = "0123456789abcdef"

APPLIED, POISON, BLOCKED = Verdict.APPLIED, Verdict.POISON, Verdict.BLOCKED


def opened(store: S3Store, epoch: int = 1) -> BlobParticipant:
    participant = BlobParticipant(store)
    participant.open(LaneView("blob", 0, epoch, unclean=False))
    return participant


@pytest.fixture
def participant(s3: S3Store) -> Iterator[BlobParticipant]:
    participant = opened(s3)
    yield participant
    participant.close()


def stage(store: S3Store, content: Any = b"content", **options: Any) -> Staged:
    return store.stage(content, xid=7, log=LOG, **options)


def put(id_: int, staged: Staged, **changes: Any) -> Intent:
    return Intent.make("blob", "put", staged.digest, {**staged.payload(), **changes})._replace(id=id_)


def delete(id_: int, digest: str) -> Intent:
    return Intent.make("blob", "delete", digest, {})._replace(id=id_)


def verdicts(participant: BlobParticipant, *batch: Intent) -> list[Verdict]:
    return [outcome.verdict for outcome in participant.apply(batch, None)]


def keys(store: S3Store, prefix: str = "") -> set[str]:
    return {entry.key for entry in store.bucket.list(prefix)}


# ------------------------------------------------------------------------------------------ the bytes


both = pytest.mark.parametrize("s3_server", KINDS, indirect=True)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART + 17])
def test_s3_keeps_every_byte_from_stage_to_reader(s3: S3Store, participant: BlobParticipant, size: int) -> None:
    # Given: content of a size at the edges of a part
    content = os.urandom(size)
    # When: it is staged and published
    staged = stage(s3, io.BytesIO(content))
    assert not s3.exists(staged.digest)
    intent = put(1, staged)
    assert verdicts(participant, intent) == [APPLIED]
    participant.settle([intent])
    # Then: it is there, once, and nothing else is
    assert staged[:2] == (hashlib.sha256(content).hexdigest(), size)
    with s3.open(staged.digest) as file:
        assert file.read() == content
    assert s3.verify(staged.digest)
    assert list(s3.inventory()) == [Blob(staged.digest, size)]
    assert keys(s3, "staging/") == set()
    assert list(s3.bucket.uploads("")) == []


@both
def test_s3_copies_in_parts_what_is_large(
    s3: S3Store, s3_server: Server, monkeypatch: pytest.MonkeyPatch, s3_relay: Relay
) -> None:
    # Given: limits that a small blob is over, and a server that copies in parts if it can
    monkeypatch.setattr("workers.s3.COPY_WHOLE", 6 * CHUNK)
    monkeypatch.setattr(bucket.Bucket.copy_parts, "__defaults__", (5 * CHUNK,))
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    content = os.urandom(12 * CHUNK)
    staged = stage(store, content)
    participant = opened(store)
    s3_relay.seen.clear()
    # When: it is published
    assert verdicts(participant, put(1, staged)) == [APPLIED]
    # Then: all of it is there; the bad clone was found out at the start, and copies it whole
    assert s3.verify(staged.digest)
    assert any("uploadId" in path for _, path in s3_relay.seen) == (s3_server.kind == "moto")
    store.bucket.client.close()


def test_s3_reader_seeks_and_goes_on_when_the_connection_breaks(
    s3: S3Store, participant: BlobParticipant, s3_relay: Relay
) -> None:
    content = os.urandom(3 * CHUNK)
    staged = stage(s3, content)
    verdicts(participant, put(1, staged))
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    with store.open(staged.digest) as file:
        assert file.read(10) == content[:10]
        file.seek(-5, io.SEEK_END)
        assert file.read() == content[-5:]
        file.seek(CHUNK)
        s3_relay.seen.clear()
        s3_relay.rule = lambda method, _path: "half" if method == "GET" and len(s3_relay.seen) in (1, 3) else "pass"
        assert file.read() == content[CHUNK:]
        assert len(s3_relay.seen) >= 2
    store.bucket.client.close()


def test_s3_stage_leaves_nothing_when_its_source_breaks(s3: S3Store) -> None:
    # Given: a source that fails in its third part
    class Source(io.RawIOBase):
        def __init__(self, error: BaseException) -> None:
            self.error, self.left = error, 2 * PART

        def read(self, size: int = -1) -> bytes:
            if self.left <= 0:
                raise self.error
            self.left -= size
            return b"x" * size

    # When: it is staged; or it is longer or shorter than declared
    for error, expected in ((OSError(5, "text"), BlobRefused), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected):
            stage(s3, Source(error))
    for size in (PART + 5, 2 * PART + 5):
        with pytest.raises(BlobRefused, match="declared"):
            stage(s3, b"x" * (2 * PART), size=size)
    # Then: there is no object, no upload and no part
    assert keys(s3) == set()
    assert list(s3.bucket.uploads("")) == []


def test_s3_stage_aborts_its_upload_when_the_endpoint_fails(s3: S3Store, s3_relay: Relay) -> None:
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    # When: the second part is refused, again and again
    s3_relay.rule = lambda method, path: "fail" if method == "PUT" and "partNumber=2" in path else "pass"
    with pytest.raises(BlobRefused, match="S3 endpoint refuses"):
        stage(store, b"x" * (3 * PART))
    # Then: nothing is left
    assert keys(s3) == set()
    assert list(s3.bucket.uploads("")) == []
    # And when the answer to the last request is lost, the object is there all the same
    s3_relay.rule = once(lambda method, path: method == "POST" and "uploadId" in path)
    staged = stage(store, b"x" * (3 * PART))
    assert s3.bucket.size(f"staging/{staged.stage}") == 3 * PART
    store.bucket.client.close()


def test_s3_waits_when_somebody_aborts_its_uploads(
    s3: S3Store, s3_server: Server, s3_relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: somebody who aborts uploads, such as a lifecycle rule
    monkeypatch.setattr("workers.s3.COPY_WHOLE", 6 * CHUNK)
    monkeypatch.setattr(bucket.Bucket.copy_parts, "__defaults__", (5 * CHUNK,))
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    participant = opened(store)
    staged = stage(store, os.urandom(12 * CHUNK))
    s3_relay.rule = lambda _method, path: "gone" if "partNumber=2" in path else "pass"
    # When: a blob is staged, and the staged one is copied in parts
    with pytest.raises(BlobRefused, match="aborted"):
        stage(store, os.urandom(2 * PART))
    if s3_server.kind == "moto":
        # Then: it isn't taken for a blob that is lost
        with pytest.raises(Unavailable, match="aborted"):
            participant.apply([put(1, staged)], None)
    s3_relay.rule = lambda _method, _path: "pass"
    assert verdicts(participant, put(1, staged)) == [APPLIED]
    assert s3.verify(staged.digest)
    store.bucket.client.close()


def once(matches: Any) -> Any:
    """A rule that loses the first answer that matches."""
    hit: list[str] = []

    def rule(method: str, path: str) -> str:
        if not hit and matches(method, path):
            hit.append(path)
            return "lose"
        return "pass"

    return rule


def test_s3_publishes_once_when_the_answer_to_the_copy_is_lost(s3: S3Store, s3_relay: Relay) -> None:
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    staged = stage(store)
    participant = opened(store)
    s3_relay.rule = once(lambda method, path: method == "PUT" and "/objects/" in path)
    assert verdicts(participant, put(1, staged)) == [APPLIED]
    assert len([path for method, path in s3_relay.seen if method == "PUT" and "/objects/" in path]) == 2
    assert len(s3.versions(staged.digest)) == 1
    store.bucket.client.close()


# ------------------------------------------------------------------------------------- what it becomes


def test_s3_publishes_once_however_often_it_is_applied(s3: S3Store, participant: BlobParticipant) -> None:
    first, second, same = stage(s3, b"one"), stage(s3, b"two"), stage(s3, b"one")
    batch = [put(1, first), put(2, second), put(3, same)]
    for _ in range(3):  # replay after a crash before the position was stored
        assert verdicts(participant, *batch) == [APPLIED] * 3
    participant.settle(batch)
    assert keys(s3, "staging/") == set()
    assert verdicts(participant, *batch) == [APPLIED] * 3  # replay after a crash behind it
    assert set(s3.inventory()) == {Blob(first.digest, 3), Blob(second.digest, 3)}
    assert len(keys(s3, "objects/")) == 2


@both
def test_s3_deleted_can_be_put_again_and_is_purged_after_its_time(s3: S3Store, participant: BlobParticipant) -> None:
    # Given: a blob that is put, deleted, and open in a reader
    first, second = stage(s3), stage(s3)
    digest = first.digest
    verdicts(participant, put(1, first))
    reader = s3.open(digest)
    assert verdicts(participant, delete(2, digest)) == [APPLIED]
    # Then: it is gone for everyone else
    assert not s3.exists(digest)
    assert list(s3.inventory()) == []
    with pytest.raises(BlobMissing, match="no blob"):
        s3.open(digest)
    assert reader.read() == b"content"
    # When: it is put again, and the trash is too young, and then old enough
    assert verdicts(participant, put(3, second)) == [APPLIED]
    assert s3.purge_trash(3600) == 0
    assert len(s3.versions(digest)) == 3
    assert s3.purge_trash(-5) == 1
    # Then: what counts is there, and what was below it is not
    assert [version.deleted for version in s3.versions(digest)] == [False]
    assert s3.verify(digest)
    # And a delete that stays leaves nothing at all
    verdicts(participant, delete(4, digest))
    assert s3.purge_trash(-5) == 1
    assert keys(s3) == {"lanes/blob-0", *(f"staging/{s.stage}" for s in (first, second))}


def test_s3_damaged_object_of_another_size_is_replaced(s3: S3Store, participant: BlobParticipant) -> None:
    staged = stage(s3)
    s3.bucket.put(f"objects/{staged.digest[:2]}/{staged.digest}/{0:010d}-{1:010d}", b"cont")
    assert s3.size(staged.digest) == 4
    assert verdicts(participant, put(1, staged)) == [APPLIED]
    assert s3.verify(staged.digest)
    assert s3.purge_trash(-5) == 1
    assert len(s3.versions(staged.digest)) == 1


def test_s3_without_stage_and_object_is_poison_and_blocks_its_key(s3: S3Store, participant: BlobParticipant) -> None:
    lost, other, short = stage(s3, b"lost"), stage(s3, b"other"), stage(s3, b"short")
    s3.remove_stage(lost.stage)
    outcomes = participant.apply([put(1, lost), put(2, other), delete(3, lost.digest), put(4, short, size=4)], None)
    assert [o.verdict for o in outcomes] == [POISON, APPLIED, BLOCKED, POISON]
    assert "staged object is gone" in outcomes[0].error
    assert "another size" in outcomes[3].error
    assert set(s3.inventory()) == {Blob(other.digest, 5)}


def test_s3_bytes_in_the_intent_are_published_without_a_stage(s3: S3Store, participant: BlobParticipant) -> None:
    digest = hashlib.sha256(b"small").hexdigest()
    inline = Intent.make("blob", "put", digest, Inline(digest, 5, b"small").payload())._replace(id=1)
    assert verdicts(participant, inline, inline._replace(id=2)) == [APPLIED, APPLIED]
    assert s3.verify(digest)
    assert len(s3.versions(digest)) == 1
    assert verdicts(participant, delete(3, digest), inline._replace(id=4)) == [APPLIED, APPLIED]
    assert s3.verify(digest)
    assert keys(s3, "staging/") == set()


@pytest.mark.parametrize("name", ["../objects/x", "", "x" * 16 + "-7-" + "0" * 32, f"{LOG}-7-{'0' * 32}\n"])
def test_s3_nothing_but_digests_and_stages_become_keys(s3: S3Store, name: str) -> None:
    with pytest.raises(ValueError, match="name of a staged file"):
        s3.remove_stage(name)
    for method in (s3.open, s3.exists, s3.size, s3.verify):
        with pytest.raises(BlobRefused, match="digest"):
            method(name)


# ------------------------------------------------------------------------------------------- fences


@both
def test_s3_i6_late_requests_of_a_stale_owner_change_nothing(s3: S3Store) -> None:
    # Given: an owner who has made more changes than his successor will, and is suspended with a delete in hand
    first, second, other = stage(s3), stage(s3), stage(s3, b"other")
    digest = first.digest
    old = opened(s3, epoch=4)
    for number in range(10):
        verdicts(old, delete(100 + number, other.digest))
    new = opened(s3, epoch=5)
    assert old._publisher is not None
    with pytest.raises(Fenced, match="epoch 5"):
        old.apply([delete(2, digest)], None)
    late: Any = old._publisher  # his requests are on their way all the same
    # When: his successor has done it all, and the old delete arrives
    verdicts(new, put(1, first), delete(2, digest), put(3, second), put(4, other))
    late.delete(digest, epoch=4, id=2)
    # Then: the blob is there
    assert s3.verify(digest)
    # When: his successor has deleted it, and the old copy arrives
    verdicts(new, delete(5, digest), delete(6, other.digest))
    late._copy(first, late._version(digest), {})
    # Then: it stays deleted
    assert not s3.exists(digest)
    assert list(s3.inventory()) == []
    with pytest.raises(Fenced, match="epoch 5"):
        opened(s3, epoch=4)


def test_s3_i6_late_repetition_of_an_owners_own_delete_changes_nothing(
    s3: S3Store, participant: BlobParticipant, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: the request of a delete, which was given up as lost, and repeated under the same name or another
    staged, again = stage(s3), stage(s3)
    sent: list[tuple[str, bytes]] = []
    real = bucket.Bucket.put

    def put_(self: bucket.Bucket, key: str, content: bytes, **more: Any) -> None:
        sent.append((key, content))
        real(self, key, content, **more)

    monkeypatch.setattr(bucket.Bucket, "put", put_)
    verdicts(participant, put(1, staged), delete(2, staged.digest), put(3, again))
    # When: it arrives at last
    for key, content in sent:
        real(s3.bucket, key, content)
    # Then: the put that came after it counts
    assert s3.verify(staged.digest)


def test_s3_i4_changes_of_one_blob_stay_in_order_among_many(s3: S3Store, participant: BlobParticipant) -> None:
    staged = [stage(s3, bytes([n])) for n in range(12)]
    batch = [put(n, s) for n, s in enumerate(staged, 1)]
    batch += [delete(20 + n, s.digest) for n, s in enumerate(staged) if n % 2]
    batch += [put(40 + n, s) for n, s in enumerate(staged) if n % 4 == 1]
    assert verdicts(participant, *batch) == [APPLIED] * len(batch)
    assert {b.digest for b in s3.inventory()} == {s.digest for n, s in enumerate(staged) if n % 4 != 3}


def test_s3_blob_is_never_seen_in_part(s3: S3Store, participant: BlobParticipant) -> None:
    contents = [os.urandom(PART + 1000) for _ in range(4)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    stop, seen, partial = threading.Event(), set[str](), list[str]()

    def read() -> None:
        while not stop.is_set() or not seen:
            for digest in digests:
                if s3.exists(digest):
                    seen.add(digest)
                    if not s3.verify(digest):
                        partial.append(digest)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number, content in enumerate(contents, 1):
            assert verdicts(participant, put(number, stage(s3, content))) == [APPLIED]
    finally:
        stop.set()
        reader.join()
    assert partial == []
    assert seen


# ----------------------------------------------------------------------------------------- endpoints


@both
def test_endpoint_probe_finds_what_a_server_ignores(s3: S3Store, s3_server: Server) -> None:
    found = probe(s3.bucket)
    assert (
        found
        == {
            "moto": Endpoint(lists=True, copies=True, uploads=True, copies_parts=True, checks=False, conditions=True),
            "rclone": Endpoint(
                lists=True, copies=True, uploads=True, copies_parts=False, checks=False, conditions=False
            ),
        }[s3_server.kind]
    )
    assert found.lacks == []
    assert len(found.warnings) == {"moto": 1, "rclone": 2}[s3_server.kind]
    # It leaves nothing.
    assert keys(s3) == set()
    assert list(s3.bucket.uploads("")) == []


def test_endpoint_that_does_not_copy_is_refused_and_the_lane_waits(s3: S3Store, s3_relay: Relay) -> None:
    store = S3Store(f"s3://{s3.bucket.name}/{s3.bucket.where('')['Key']}", s3_relay.endpoint)
    s3_relay.rule = lambda method, path: "fail" if method == "POST" and "uploads" in path else "pass"
    with pytest.raises(Unavailable, match="does not take, list and abort uploads"):
        opened(store)
    assert keys(s3) == set()
    # Asked again when it has been repaired.
    s3_relay.rule = lambda _method, _path: "pass"
    opened(store).close()
    store.bucket.client.close()


def test_s3_trouble_says_what_and_no_addresses(s3: S3Store, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = S3Store("s3://nobody-has-this", s3_server.endpoint)
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        absent.exists("a" * 64)
    with pytest.raises(BlobRefused, match="NoSuchBucket"):
        stage(absent)
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        opened(absent)
    absent.bucket.client.close()
    monkeypatch.setitem(bucket._CONFIG, "retries", {"total_max_attempts": 1})
    nobody = S3Store("s3://blobs", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="can't be reached") as caught:
        nobody.exists("a" * 64)
    assert "127.0.0.1" not in str(caught.value)
    nobody.bucket.client.close()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    stranger = S3Store("s3://blobs", s3_server.endpoint)
    with pytest.raises(Unavailable, match="no credentials"):
        stranger.exists("a" * 64)
    stranger.bucket.client.close()


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("s3://", None), ("s3://a", None), ("s3:bucket", None), ("s3://Bucket", None), ("s3://bucket/a?b", None),
        ("s3://KEY:secret@bucket/p", None), ("s3://bucket", "127.0.0.1:9000"), ("s3://bucket", "ftp://host"),
        ("s3://bucket", "http://KEY:secret@host"), ("s3://bucket", "http://host/path"),
    ],
)  # fmt: skip
def test_s3_refuses_what_is_no_bucket_and_repeats_no_secret(url: str, endpoint: str | None) -> None:
    with pytest.raises(NotReady, match="write ") as caught:
        S3Store(url, endpoint)
    assert "secret" not in str(caught.value)
