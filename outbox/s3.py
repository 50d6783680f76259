"""The blob store in an S3 bucket: the same blobs as in a directory, with names that need no fence.

    <prefix>/staging/<log>-<xid>-<random>                   durable bytes whose transaction may still be rolled back
    <prefix>/objects/ab/<digest>/<epoch>-<n>                a published blob: the n-th change of the lane's owner
    <prefix>/objects/ab/<digest>/<epoch>-<n>.deleted        it was deleted by that change
    <prefix>/trash/<epoch>-<id>-<digest>                    a blob that the sweeper looks at after a day
    <prefix>/lanes/blob-<lane>                              the highest epoch that opened the lane

Of a digest's versions the highest counts. Nothing that a reader may look at is ever overwritten or, within a day,
removed: a request that arrives late, from an owner who was fenced or from a connection that was given up, writes a
version that is below its successor's and changes nothing. So S3's conditions are not needed, which many servers
ignore (`docs/decisions/0008`).

Who calls what is as in `outbox.blob`; the worker publishes by `workers.s3`. The staged object is durable when `stage`
returns. `import outbox` doesn't load this module.

Errors: `BlobRefused` when bytes can't be staged, `BlobMissing` when a blob isn't published, `Unavailable` when the
endpoint fails; OSError when it fails a reader in the middle of a blob.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from outbox.blob import Blob, Stage, Staged, check_digest, check_stage, missing, parse_stage, stage_name, staged
from outbox.bucket import Bucket, Object
from outbox.endpoint import Endpoint, probe
from outbox.errors import BlobRefused, StoreRefused, Unavailable
from outbox.source import CHUNK, Readable, Source, reading

PART = 8 * CHUNK
"""Bytes of a part of an upload, and what staging needs of memory (twice). What is smaller goes in one request."""

PARTS = 10_000
"""Parts that S3 accepts."""

PART_MOST = 32 * CHUNK
"""Parts grow with the declared size up to this."""

_VERSION = re.compile(r"objects/[0-9a-f]{2}/([0-9a-f]{64})/(\d{10}-\d{10})(\.deleted)?")
_TRASH = re.compile(r"trash/\d+-\d+-([0-9a-f]{64})")


class Version(NamedTuple):
    """One change of a blob."""

    key: str
    digest: str
    #: Epoch and number, of fixed width: a later change is greater.
    number: str
    deleted: bool
    size: int
    #: Seconds since 1970.
    modified: float


class S3Store:
    """A bucket of blobs. Making the object does nothing yet; any number of threads may share it."""

    #: Looking costs three requests.
    sweep_every = 60.0

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        """`url` is `s3://BUCKET/PREFIX`. Raises `NotReady` when it has another shape."""
        self.bucket = Bucket(url, endpoint)
        self._endpoint: Endpoint | None = None

    # ------------------------------------------------------------------------------- the application's

    def stage(
        self, source: Readable, *, xid: int, log: str, size: int | None = None, limit: int | None = None
    ) -> Staged:
        """Copy `source` into the bucket; durable when it returns. As `BlobStore.stage`."""
        name = stage_name(log, xid)
        key = f"staging/{name}"
        with reading(source, size, limit) as content:
            parts = _parts(content)
            first = next(parts)
            try:
                if len(first) < _part_size(content):
                    self.bucket.put(key, first)
                else:
                    self.bucket.upload(key, chain([first], parts))
            except BaseException as error:
                # An answer that was lost leaves the object behind.
                with suppress(Unavailable):
                    self.bucket.delete([key])
                if isinstance(error, Unavailable):
                    raise StoreRefused(f"the blob store can't be written: {error}") from None
                raise
        return staged(content, name)

    def open(self, digest: str) -> BufferedReader:
        """A published blob, to read and to seek in. Raises `BlobMissing`.

        It stays readable while it is open, even when it is deleted meanwhile: for as long as trash is kept.
        """
        found = self.newest(digest)
        if found is None or found.deleted:
            raise missing()
        return BufferedReader(Object(self.bucket, found.key, found.size), CHUNK)

    def size(self, digest: str) -> int | None:
        """Bytes of a published blob; None if there is none."""
        found = self.newest(digest)
        return None if found is None or found.deleted else found.size

    def exists(self, digest: str) -> bool:
        """Whether the blob is published."""
        return self.size(digest) is not None

    def verify(self, digest: str) -> bool:
        """Whether the blob's bytes still have its digest. Reads all of it; `BlobMissing` if there is none."""
        with self.open(digest) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    def inventory(self) -> Iterator[Blob]:
        """Every published blob, in order of digest. What isn't a blob is passed over."""
        for _, versions in groupby(self._versions("objects/"), key=lambda version: version.digest):
            newest = max(versions, key=lambda version: version.number)
            if not newest.deleted:
                yield Blob(newest.digest, newest.size)

    def strays(self) -> Iterator[str]:
        """What lies among the objects and is no version of a blob, as keys from there. No reader ever sees it."""
        for entry in self.bucket.list("objects/"):
            match = _VERSION.fullmatch(entry.key)
            if not match or not entry.key.startswith(f"objects/{match[1][:2]}/"):
                yield entry.key.removeprefix("objects/")

    # ------------------------------------------------------------------------------------- the worker's

    def endpoint(self) -> Endpoint:
        """What the endpoint honours; tried once, and again for as long as something is lacking."""
        if self._endpoint is None or self._endpoint.lacks:
            self._endpoint = probe(self.bucket)
        return self._endpoint

    def newest(self, digest: str) -> Version | None:
        """The version that counts."""
        found = self.versions(digest)
        return found[-1] if found else None

    def versions(self, digest: str) -> list[Version]:
        """All versions of a blob, in their order."""
        check_digest(digest)
        return sorted(self._versions(f"objects/{digest[:2]}/{digest}/"), key=lambda version: version.number)

    def _versions(self, prefix: str) -> Iterator[Version]:
        for entry in self.bucket.list(prefix):
            match = _VERSION.fullmatch(entry.key)
            if match and entry.key.startswith(f"objects/{match[1][:2]}/"):
                yield Version(
                    entry.key, match[1], match[2], match[3] is not None, entry.size, entry.modified.timestamp()
                )

    # ------------------------------------------------------------------------------------ the sweeper's

    def stages(self) -> Iterator[Stage]:
        """Everything staged, and uploads that aren't complete. What has another name is passed over."""
        keys = {entry.key for entry in self.bucket.list("staging/")}
        keys |= {upload.key for upload in self.bucket.uploads("staging/")}
        yield from filter(None, (parse_stage(key.removeprefix("staging/")) for key in keys))

    def remove_stage(self, name: str) -> bool:
        """Remove a staged object, and abort its upload if that isn't complete. S3 doesn't tell if it was there."""
        check_stage(name)
        key = f"staging/{name}"
        for upload in self.bucket.uploads(key):
            self.bucket.abort(upload.key, upload.id)
        self.bucket.delete([key])
        return True

    def purge_trash(self, age: float) -> int:
        """Remove what was deleted or replaced `age` seconds ago, and what was begun then and broken off.
        → how many deletions."""
        before = time.time() - age
        purged = 0
        for entry in self.bucket.list("trash/"):
            match = _TRASH.fullmatch(entry.key)
            if match and entry.modified.timestamp() <= before:
                self._purge(match[1], before)
                # Last, so that a crash leaves the marker to the next sweep.
                self.bucket.delete([entry.key])
                purged += 1
        # Copies and probes that a crash broke off.
        for prefix in ("objects/", "probe/"):
            for upload in self.bucket.uploads(prefix):
                if upload.initiated.timestamp() <= before:
                    self.bucket.abort(upload.key, upload.id)
        for entry in self.bucket.list("probe/"):
            if entry.modified.timestamp() <= before:
                self.bucket.delete([entry.key])
        return purged

    def _purge(self, digest: str, before: float) -> None:
        """Remove each version whose successor is older than `before`; then the last one, if it says "deleted"."""
        versions = self.versions(digest)
        old = [v.key for v, successor in pairwise(versions) if successor.modified <= before]
        for start in range(0, len(old), 1000):
            self.bucket.delete(old[start : start + 1000])
        if versions and len(old) == len(versions) - 1 and versions[-1].deleted and versions[-1].modified <= before:
            self.bucket.delete([versions[-1].key])


def _part_size(content: Source) -> int:
    """Parts are of one size but for the last (not every server takes others), and there are 10,000 at most."""
    wanted = -(-(content.expected or 0) // (PARTS * CHUNK)) * CHUNK
    return max(PART, min(PART_MOST, wanted))


def _parts(content: Source) -> Iterator[bytearray]:
    """The bytes in parts; one at least, which may be empty. Raises `BlobRefused` when they are too many."""
    size = _part_size(content)
    buffer = bytearray()
    count = 0
    for piece in content:
        buffer += piece
        while len(buffer) >= size:
            count += 1
            if count > PARTS:
                raise BlobRefused(
                    f"the blob is over {PARTS * size:,} bytes, which is S3's limit for it: declare its size "
                    f"(then {PARTS * PART_MOST:,} bytes are possible), or split it"
                )
            yield buffer[:size]
            del buffer[:size]
    if buffer or not count:
        yield buffer
