"""The participant `blob`: intents to publish and delete blobs, applied to the store.

    put     key: the digest   payload: {"digest", "size", "stage", …}   publish what was staged
                              or       {"digest", "size", "bytes", …}   publish these bytes (base64)
    delete  key: the digest   payload: {}                               move the blob into the trash

The reader calls it. Both actions can be made again harmlessly, so no attempt is recorded. They are durable
when `apply` returns. What was staged goes in `settle`, after the position is durable; what a crash leaves there,
the sweeper removes.

How blobs become visible, and how a stale owner is kept from changing them, is the publisher's business:
`workers.publication` for a directory, `workers.s3` for a bucket.

Errors: trouble of the store is `Unavailable`, and the lane waits; an intent that can't be applied is poison, and
later ones of its key in the batch are blocked behind it.
"""

from __future__ import annotations

import hashlib
import os
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import repeat
from typing import Any, Protocol

from outbox.blob import BlobStore, Inline, Staged, check_digest, is_stage
from outbox.errors import Permanent, Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.participant import APPLIED, Doubt, Evidence, Item, LaneView, Outcome, Verdict
from outbox.position import Position
from outbox.store import Store
from workers.publication import DirectoryPublisher

_BLOCKED = Outcome(Verdict.BLOCKED)


class Publication(Protocol):
    """A batch of changes to the blobs that readers see. Each can be made again harmlessly."""

    def put(self, content: Staged | Inline) -> None:
        """Publish what was staged, or small bytes. Raises `BlobMissing` if it is gone and the blob isn't published
        either, `BlobRefused` if it is not what was staged."""

    def delete(self, digest: str, *, epoch: int, id: int) -> None:  # noqa: A002 - the intent's
        """Move a blob into the trash; it may not be there."""


class Publisher(Protocol):
    """What a lane's owner may do to the published blobs."""

    #: Blobs that are worth being changed at a time.
    threads: int

    def batch(self) -> AbstractContextManager[Publication]:
        """Changes, durable when the block is left. Raises `Fenced` when a newer owner has opened the lane."""

    def settle(self, stages: Sequence[str]) -> None:
        """Remove what was staged and is published."""

    def close(self) -> None:
        """Let go of the lane."""


class BlobParticipant:
    """One lane of the blob store."""

    batch_limit = 256
    batch_bytes = 1_000_000
    records_attempts = False
    keeps_position = False

    def __init__(self, store: Store) -> None:
        self.store = store
        self._epoch = 0
        self._publisher: Publisher | None = None
        # Intent → what it staged, for what this process applied: only that may be removed in `settle`, and
        # not what was parked in between.
        self._stages: dict[int, str] = {}

    def open(self, lane: LaneView) -> None:
        """Take the lane's fence. Raises `Fenced` if a newer owner has it, `Unavailable` without a store."""
        with _trouble():
            self._publisher = publisher(self.store, lane)
        hit("blob.opened")
        self._epoch = lane.epoch

    def position(self) -> Position | None:
        """None: the lane's position in Postgres counts."""
        return None

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Not asked for: no attempt is recorded."""

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002 - protocol
        """Publish and delete, in order. Durable when it returns."""
        assert self._publisher is not None  # noqa: S101 - the reader opens before it applies
        blobs: dict[str, list[Intent]] = {}
        for intent in batch:
            blobs.setdefault(intent.key, []).append(intent)
        outcomes: dict[int, Outcome] = {}
        with _trouble(), self._publisher.batch() as publication:
            threads = min(self._publisher.threads, len(blobs))
            # Changes of one blob are made in their order; different blobs have none.
            if threads > 1:
                with ThreadPoolExecutor(threads, "blob") as pool:
                    made = list(pool.map(_in_order, repeat(publication), blobs.values(), repeat(self._epoch)))
            else:
                made = [_in_order(publication, intents, self._epoch) for intents in blobs.values()]
            for each in made:
                outcomes.update(each)
        hit("blob.published")
        for intent in batch:
            if intent.action == "put" and outcomes[intent.id] is APPLIED:
                content = content_of(intent)
                if isinstance(content, Staged):
                    self._stages[intent.id] = content.stage
        return [outcomes[intent.id] for intent in batch]

    def settle(self, batch: Sequence[Intent]) -> None:
        """Remove what was staged for what was applied."""
        assert self._publisher is not None  # noqa: S101 - as in apply
        stages = [stage for intent in batch if (stage := self._stages.pop(intent.id, None)) is not None]
        with _trouble():
            self._publisher.settle(stages)

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        """Look whether the blobs are there."""
        with _trouble():
            return [(self._look(doubt.intent), None) for doubt in doubts]

    def _look(self, intent: Intent) -> Evidence:
        try:
            check_digest(intent.key)
            wanted = None if intent.action == "delete" else content_of(intent).size
        except Permanent:
            return Evidence.NOT_APPLIED  # it can't be applied, and never was
        return Evidence.APPLIED if self.store.size(intent.key) == wanted else Evidence.NOT_APPLIED

    def inventory(self) -> Iterator[Item]:
        """Every published blob. That its bytes have its digest is for `BlobStore.verify`."""
        for blob in self.store.inventory():
            yield Item(blob.digest, blob.digest, 0)

    def close(self) -> None:
        """Let go of the lane."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None


def publisher(store: Store, lane: LaneView) -> Publisher:
    if isinstance(store, BlobStore):
        return DirectoryPublisher(store, lane)
    from outbox.s3 import S3Store  # noqa: PLC0415 - boto3 is loaded only where it is used
    from workers.s3 import BucketPublisher  # noqa: PLC0415

    assert isinstance(store, S3Store)  # noqa: S101 - there are two
    return BucketPublisher(store, lane)


def _in_order(publication: Publication, intents: Sequence[Intent], epoch: int) -> dict[int, Outcome]:
    """Apply the intents of one blob. → intent → outcome."""
    outcomes: dict[int, Outcome] = {}
    for intent in intents:
        failed = any(outcome is not APPLIED for outcome in outcomes.values())
        outcomes[intent.id] = _BLOCKED if failed else _one(publication, intent, epoch)
    return outcomes


def _one(publication: Publication, intent: Intent, epoch: int) -> Outcome:
    """Apply one intent; durable with its batch."""
    try:
        if intent.action == "put":
            publication.put(content_of(intent))
        elif intent.action == "delete":
            check_digest(intent.key)
            publication.delete(intent.key, epoch=epoch, id=intent.id)
        else:
            return Outcome(Verdict.POISON, error=f"intent {intent.id} is no put and no delete: correct what writes it")
    except Permanent as error:
        return Outcome(Verdict.POISON, error=str(error))
    return APPLIED


def content_of(intent: Intent) -> Staged | Inline:
    """What a put publishes. Raises `Permanent` when the payload doesn't say it."""
    payload = intent.payload
    if isinstance(payload, dict):
        digest, size, stage, text = (payload.get(name) for name in ("digest", "size", "stage", "bytes"))
        # A bool is an int to Python. The key is the digest, or two lanes could work on one blob.
        if type(size) is int and size >= 0 and isinstance(digest, str) and digest == intent.key:
            check_digest(digest)
            if isinstance(stage, str) and is_stage(stage):
                return Staged(digest, size, stage)
            if isinstance(text, str) and (content := _decoded(text)) is not None:
                found = Inline(hashlib.sha256(content).hexdigest(), len(content), content)
                if found[:2] == (digest, size):
                    return found
    raise Permanent(
        f"intent {intent.id} is not a blob's put: its payload must be what outbox.blobs.put makes, its key the digest"
    )


def _decoded(text: str) -> bytes | None:
    try:
        return a2b_base64(text)
    except ValueError:
        return None


@contextmanager
def _trouble() -> Iterator[None]:
    """Trouble of the file system: the lane waits, and nothing is counted as tried."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Unavailable(f"the blob store's file system fails ({reason}): repair it, or make room") from error
