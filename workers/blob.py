"""The participant `blob`: intents to publish and delete blobs, applied to the local blob store.

    put     key: the digest   payload: {"digest", "size", "stage", …}   publish the staged file
    delete  key: the digest   payload: {}                               move the blob into the trash

The reader calls it. Both actions can be made again harmlessly, so no attempt is recorded. They are durable
when `apply` returns: the links are made, then each folder is fsynced once for the whole batch. The staged
files go in `settle`, after the position is durable; what a crash leaves there, the sweeper removes.

Fencing: each lane has a lock file in the store with the highest epoch that opened it. A batch is linked
under that lock, so an owner who was suspended through a takeover changes nothing when he wakes up (`Fenced`).

Errors: trouble of the file system is `Unavailable`, and the lane waits; an intent that can't be applied
is poison, and later ones of its key in the batch are blocked behind it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from outbox.blob import BlobStore, Staged, check_digest, is_stage
from outbox.errors import Fenced, Permanent, Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.participant import APPLIED, Doubt, Evidence, Item, LaneView, Outcome, Verdict
from outbox.position import Position
from workers.publication import Publication

LOCK_WAIT = 2.0
"""Seconds to wait for a lane's lock. An owner holds it for the links of one batch: some milliseconds."""

_BLOCKED = Outcome(Verdict.BLOCKED)


class BlobParticipant:
    """One lane of the blob store."""

    batch_limit = 256
    batch_bytes = 1_000_000
    records_attempts = False
    keeps_position = False

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self._epoch = 0
        self._fence: Fence | None = None
        # Intent → its staged file, for what this process applied: only that may be removed in `settle`, and
        # not what was parked in between.
        self._stages: dict[int, str] = {}

    def open(self, lane: LaneView) -> None:
        """Take the lane's fence. Raises `Fenced` if a newer owner has it, `Unavailable` without a store."""
        with _trouble():
            self.store.make()
            self._fence = Fence(self.store, lane)
        hit("blob.opened")
        self._epoch = lane.epoch

    def position(self) -> Position | None:
        """None: the lane's position in Postgres counts."""
        return None

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Not asked for: no attempt is recorded."""

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002 - protocol
        """Publish and delete, in order. Durable when it returns."""
        assert self._fence is not None  # noqa: S101 - the reader opens before it applies
        outcomes: list[Outcome] = []
        failed: set[str] = set()
        with _trouble(), Publication(self.store) as publication:
            with self._fence.held():
                for intent in batch:
                    outcome = _BLOCKED if intent.key in failed else _one(publication, intent, self._epoch)
                    if outcome is not APPLIED:
                        failed.add(intent.key)
                    outcomes.append(outcome)
            hit("blob.linked")
            try:
                publication.sync()
            except OSError:
                # The next try must change the folders anew: a second fsync of the same change proves nothing.
                with self._fence.held():
                    publication.undo()
                raise
            hit("blob.published")
        self._stages.update(
            (intent.id, _staged(intent).stage)
            for intent, outcome in zip(batch, outcomes, strict=True)
            if outcome is APPLIED and intent.action == "put"
        )
        return outcomes

    def settle(self, batch: Sequence[Intent]) -> None:
        """Remove the staged files of what was applied."""
        with _trouble():
            for intent in batch:
                stage = self._stages.pop(intent.id, None)
                if stage is not None:
                    self.store.remove_stage(stage)
                    hit("blob.settled")

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        """Look whether the blobs are there."""
        with _trouble():
            return [(self._look(doubt.intent), None) for doubt in doubts]

    def _look(self, intent: Intent) -> Evidence:
        try:
            check_digest(intent.key)
            wanted = None if intent.action == "delete" else _staged(intent).size
        except Permanent:
            return Evidence.NOT_APPLIED  # it can't be applied, and never was
        return Evidence.APPLIED if self.store.size(intent.key) == wanted else Evidence.NOT_APPLIED

    def inventory(self) -> Iterator[Item]:
        """Every published blob. That its bytes have its digest is for `BlobStore.verify`."""
        for blob in self.store.inventory():
            yield Item(blob.digest, blob.digest, 0)

    def close(self) -> None:
        """Let go of the lane's lock file."""
        if self._fence is not None:
            self._fence.close()
            self._fence = None


class Fence:
    """A lane's lock file with the highest epoch that opened the lane. It needs no fsync: what ends the
    machine ends every owner that the fence is against."""

    def __init__(self, store: BlobStore, lane: LaneView) -> None:
        self._epoch = lane.epoch
        self._name = f"{lane.target}-{lane.lane}"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with store.folder("lanes") as folder:
            self._file = os.open(self._name, flags, 0o640, dir_fd=folder)
        try:
            with self.held():
                os.pwrite(self._file, b"%020d" % lane.epoch, 0)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. Raises `Fenced` if a newer owner has opened the lane."""
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another process holds lanes/{self._name} of the blob store: end it, it may be suspended"
                    ) from None
                time.sleep(0.01)
            else:
                break
        try:
            epoch = int(os.pread(self._file, 20, 0) or b"0")
            if epoch > self._epoch:
                raise Fenced(
                    f"the blob store knows epoch {epoch} of lane {self._name} and this owner has {self._epoch}: "
                    f"another worker has taken over (or remove lanes/{self._name}, if the database was restored)"
                )
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the lock file."""
        os.close(self._file)


def _one(publication: Publication, intent: Intent, epoch: int) -> Outcome:
    """Apply one intent; durable with its batch."""
    try:
        if intent.action == "put":
            publication.put(_staged(intent))
        elif intent.action == "delete":
            check_digest(intent.key)
            publication.delete(intent.key, epoch=epoch, id=intent.id)
        else:
            return Outcome(Verdict.POISON, error=f"intent {intent.id} is no put and no delete: correct what writes it")
    except Permanent as error:
        return Outcome(Verdict.POISON, error=str(error))
    return APPLIED


def _staged(intent: Intent) -> Staged:
    """What a put publishes. Raises `Permanent` when the payload doesn't say it."""
    payload = intent.payload
    if isinstance(payload, dict):
        staged = Staged(payload.get("digest"), payload.get("size"), payload.get("stage"))  # type: ignore[arg-type]
        # A bool is an int to Python. The key is the digest, or two lanes could work on one blob.
        if type(staged.size) is int and staged.size >= 0 and is_stage(staged.stage) and staged.digest == intent.key:
            check_digest(staged.digest)
            return staged
    raise Permanent(
        f"intent {intent.id} is not a blob's put: its payload must be what BlobStore.payload made, its key the digest"
    )


@contextmanager
def _trouble() -> Iterator[None]:
    """Trouble of the file system: the lane waits, and nothing is counted as tried."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Unavailable(f"the blob store's file system fails ({reason}): repair it, or make room") from error
