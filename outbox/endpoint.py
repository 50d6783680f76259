"""What an S3 endpoint really honours, found out by trying.

`probe` writes and removes a few small objects below `probe/` of the bucket, and one upload in parts. The worker
calls it when it opens a lane and refuses an endpoint that lacks what blobs need; whoever sets a server up can call it
too. Servers that speak S3 differ in what they pass over in silence, and their documentation rarely says so.

Nothing is left behind but after a crash; that the sweeper removes a day later. Raises `Unavailable` when the endpoint
can't be reached or refuses.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from outbox.bucket import Bucket, checksum
from outbox.errors import Unavailable

PART = 5 * 1024 * 1024
"""Bytes of the smallest part that S3 accepts."""


class Endpoint(NamedTuple):
    """What was found. The first three are needed."""

    #: What was written can be read and is listed at once.
    lists: bool
    #: Objects are copied on the server.
    copies: bool
    #: Objects are uploaded in parts, and uploads can be listed and aborted.
    uploads: bool
    #: Large objects are copied in parts.
    copies_parts: bool
    #: Bytes with a wrong checksum are refused.
    checks: bool
    #: A conditional put (If-None-Match) does not overwrite.
    conditions: bool

    @property
    def lacks(self) -> list[str]:
        """What blobs can't do without, in sentences."""
        needed = {
            "it does not show at once what was written": self.lists,
            "it does not copy objects": self.copies,
            "it does not take, list and abort uploads in parts": self.uploads,
        }
        return [sentence for sentence, there in needed.items() if not there]

    @property
    def warnings(self) -> list[str]:
        """What is worse than it could be, and what follows from it."""
        wanted = {
            "it accepts a wrong checksum: bytes damaged on the way are found by reading (`verify`)": self.checks,
            "it does not copy in parts: a blob over 1 GiB is one request, over 5 GiB a refusal": self.copies_parts,
        }
        return [sentence for sentence, there in wanted.items() if not there]


def probe(bucket: Bucket) -> Endpoint:
    """Try everything."""
    place = f"probe/{uuid.uuid4().hex}"
    with _cleared(bucket, place):
        content = b"probe"
        bucket.put(f"{place}/put", content)
        listed = [(entry.key, entry.size) for entry in bucket.list(place)] == [(f"{place}/put", len(content))]
        lists = listed and bucket.get(f"{place}/put") == content
        copies = bucket.copy(f"{place}/put", f"{place}/copy", {"sha256": "probe"})
        return Endpoint(
            lists,
            copies and bucket.get(f"{place}/copy") == content,
            _uploads(bucket, f"{place}/parts"),
            _copies_parts(bucket, f"{place}/parts", f"{place}/copied"),
            _refuses(bucket, f"{place}/checked", ChecksumSHA256=checksum(b"other")),
            _refuses(bucket, f"{place}/put", IfNoneMatch="*"),
        )


def _uploads(bucket: Bucket, key: str) -> bool:
    """Whether an upload in two parts is whole, and one that isn't completed is listed, aborted, and then gone."""
    try:
        bucket.upload(key, [b"a" * PART, b"b"])
        given_up = bucket.client.create_multipart_upload(**bucket.where(f"{key}-not"))["UploadId"]
        seen = [upload.id for upload in bucket.uploads(f"{key}-not")]
        bucket.abort(f"{key}-not", given_up)
        return bucket.size(key) == PART + 1 and seen == [given_up] and not list(bucket.uploads(f"{key}-not"))
    except Unavailable:
        return False


def _copies_parts(bucket: Bucket, source: str, key: str) -> bool:
    try:
        return bucket.copy_parts(source, key, PART + 1, {}, part=PART) and bucket.size(key) == PART + 1
    except Unavailable:
        return False


def _refuses(bucket: Bucket, key: str, **more: str) -> bool:
    """Whether a put with these arguments fails, as it should."""
    try:
        bucket.put(key, b"probe", **more)
    except Unavailable:
        return True
    return False


@contextmanager
def _cleared(bucket: Bucket, place: str) -> Iterator[None]:
    """Remove what this probe wrote."""
    try:
        yield
    finally:
        with suppress(Unavailable):
            for upload in bucket.uploads(f"{place}/"):
                bucket.abort(upload.key, upload.id)
            bucket.delete([entry.key for entry in bucket.list(f"{place}/")])
