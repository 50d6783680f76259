"""Publishing in a bucket: new versions of blobs, each under a name that nobody else uses.

`workers.blob` calls it. A put copies the staged object on the server into `objects/ab/<digest>/<epoch>-<n>`; a
delete writes an empty `objects/ab/<digest>/<epoch>-<n>.deleted`, after a marker in `trash/` by which the sweeper
finds what may go after a day. Each change is durable when it returns.

Fencing: `n` counts the changes of one owner and `epoch` is his, so what he does is above everything that earlier
owners did or are still to do. A request of theirs that arrives late loses, whatever it is. The epoch that is kept in
`lanes/` makes a fenced owner stop at his next batch, and finds a database that was restored to an earlier time; no
promise depends on it.

Trouble of the endpoint is `Unavailable`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from outbox.blob import BlobMissing, Inline, Staged, check_digest
from outbox.bucket import COPY_WHOLE
from outbox.errors import BlobRefused, Fenced, Unavailable
from outbox.failpoint import hit
from outbox.participant import LaneView
from outbox.s3 import S3Store

log = logging.getLogger("outbox.blob")


class BucketPublisher:
    """What a lane's owner may do to the blobs of a bucket."""

    #: A put is three requests, which mostly wait.
    threads = 8

    def __init__(self, store: S3Store, lane: LaneView) -> None:
        """Try what the endpoint honours, and take the lane's fence.

        Raises `Unavailable` if it lacks what is needed, `Fenced` if a newer owner has the lane.
        """
        self._store = store
        self._lane = lane
        self._fence = f"lanes/{lane.target}-{lane.lane}"
        self._changes = count(1)
        self._lock = threading.Lock()
        self._check()
        endpoint = store.endpoint()
        if endpoint.lacks:
            raise Unavailable(f"the S3 endpoint can't keep blobs: {'; '.join(endpoint.lacks)}: use another server")
        for sentence in endpoint.warnings:
            log.warning("blob: the S3 endpoint: %s", sentence)
        self._copies_parts = endpoint.copies_parts
        store.bucket.put(self._fence, b"%020d" % lane.epoch)

    @contextmanager
    def batch(self) -> Iterator[BucketPublisher]:
        """Changes, each durable when it is made."""
        self._check()
        yield self

    def put(self, content: Staged | Inline) -> None:
        """Publish a staged object, by a copy on the server, or small bytes."""
        newest = self._store.newest(content.digest)
        alive = newest is not None and not newest.deleted
        if newest is not None and alive and newest.size == content.size:
            return
        if isinstance(content, Staged):
            self._check_stage(content)
        if newest is not None and alive:
            self._mark(content.digest, newest.number)  # a damaged one, which is replaced
        version, metadata = self._version(content.digest), {"sha256": content.digest}
        if isinstance(content, Inline):
            self._store.bucket.put(version, content.content, Metadata=metadata)
        elif not self._copy(content, version, metadata):
            raise _gone()
        hit("blob.copied")

    def _check_stage(self, staged: Staged) -> None:
        found = self._store.bucket.size(f"staging/{staged.stage}")
        if found is None:
            raise _gone()
        if found != staged.size:
            raise BlobRefused(
                "the staged object is not the one that was staged (another size): stage the bytes again in a new "
                "transaction, then skip this intent"
            )

    def _copy(self, staged: Staged, version: str, metadata: dict[str, str]) -> bool:
        source = f"staging/{staged.stage}"
        if staged.size > COPY_WHOLE and self._copies_parts:
            return self._store.bucket.copy_parts(source, version, staged.size, metadata)
        return self._store.bucket.copy(source, version, metadata)

    def delete(self, digest: str, *, epoch: int, id: int) -> None:  # noqa: A002 - the intent's
        """Let a blob be deleted from now on. Always said, even if it isn't there: an earlier owner's copy may be
        on its way."""
        check_digest(digest)
        self._mark(digest, f"{epoch}-{id}")
        hit("blob.marked")
        self._store.bucket.put(f"{self._version(digest)}.deleted", b"")

    def settle(self, stages: Sequence[str]) -> None:
        """Remove staged objects that are published."""
        self._store.bucket.delete(f"staging/{stage}" for stage in stages)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _mark(self, digest: str, change: str) -> None:
        """Let the sweeper look at a blob when its trash is old enough."""
        self._store.bucket.put(f"trash/{change}-{digest}", b"")

    def _version(self, digest: str) -> str:
        with self._lock:
            number = next(self._changes)
        return f"objects/{digest[:2]}/{digest}/{self._lane.epoch:010d}-{number:010d}"

    def _check(self) -> None:
        known = int(self._store.bucket.get(self._fence) or b"0")
        if known > self._lane.epoch:
            raise Fenced(
                f"the blob store knows epoch {known} of lane {self._lane.target}-{self._lane.lane} and this owner has "
                f"{self._lane.epoch}: another worker has taken over (or the database was restored: then raise the "
                f"lane's epoch to {known})"
            )


def _gone() -> BlobMissing:
    return BlobMissing(
        "the staged object is gone and the blob is not published: stage its bytes again in a new transaction, then "
        "skip this intent"
    )
