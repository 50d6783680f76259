"""What a bucket still has of a blob, and where damaged versions are put: `workers.scrub.aside` for S3.

A copy is made by the server. What a version holds never changes, so that nobody can come between a look at it and its
removal; an older version may be right still. Errors: OSError, `Unavailable`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader

from outbox.blob import is_stage
from outbox.bucket import COPY_WHOLE, Object
from outbox.s3 import S3Store, Version
from outbox.source import CHUNK


class BucketAside:
    """A store in a bucket."""

    def __init__(self, store: S3Store) -> None:
        self._store = store

    def copies(self, digest: str, stage: object) -> Iterator[BufferedReader]:
        """From what was staged, older versions, and what was put aside."""
        keys = [f"staging/{stage}"] if is_stage(stage) else []
        keys += [version.key for version in self._store.versions(digest) if not version.deleted]
        keys += [entry.key for entry in self._store.bucket.list(f"aside/{digest}-")]
        for key in keys:
            size = self._store.bucket.size(key)
            if size is not None:
                with self._opened(key, size) as content:
                    yield content

    def set_aside(self, digest: str) -> None:
        """By a copy on the server."""
        newest = self._store.newest(digest)
        if newest is None or newest.deleted:
            return
        with self._opened(newest.key, newest.size) as content, suppress(OSError):
            if hashlib.file_digest(content, "sha256").hexdigest() == digest:
                return
        self._copy(newest)
        self._store.bucket.delete([newest.key])

    def keep(self, digest: str) -> None:
        """By a copy on the server."""
        newest = self._store.newest(digest)
        if newest is not None and not newest.deleted:
            self._copy(newest)

    def _opened(self, key: str, size: int) -> BufferedReader:
        return BufferedReader(Object(self._store.bucket, key, size), CHUNK)

    def _copy(self, version: Version) -> None:
        bucket, to = self._store.bucket, f"aside/{version.digest}-{version.number}"
        if version.size > COPY_WHOLE:
            bucket.copy_parts(version.key, to, version.size, {})
        else:
            bucket.copy(version.key, to, {})
