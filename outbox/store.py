"""Where blobs are kept: one protocol, a directory or an S3 bucket behind it.

`open_store` chooses by the setting OUTBOX_BLOBS: a directory (`outbox.blob`), or `s3://BUCKET/PREFIX` (`outbox.s3`).
Applications stage and read, the worker publishes (`workers.blob`), the sweeper tidies up (`workers.sweeper`).

What every store promises: staged bytes are durable when `stage` returns; a published blob is complete, never changes,
and is named by the sha256 of its content; nothing is named by a caller's text other than a checked digest or stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from typing import Protocol

from outbox.blob import Blob, BlobStore, Stage, Staged
from outbox.settings import Settings, is_bucket, required
from outbox.source import Readable


class Store(Protocol):
    """Where blobs are kept. Making the object does nothing yet; any number of threads may share it."""

    #: Seconds between two sweeps: what looking costs.
    sweep_every: float

    def stage(
        self, source: Readable, *, xid: int, log: str, size: int | None = None, limit: int | None = None
    ) -> Staged:
        """Copy bytes into the store; durable when it returns. Raises `BlobRefused` and leaves nothing behind."""

    def open(self, digest: str) -> BufferedReader:
        """A published blob, to read. Raises `BlobMissing`."""

    def size(self, digest: str) -> int | None:
        """Bytes of a published blob; None if there is none."""

    def exists(self, digest: str) -> bool:
        """Whether the blob is published."""

    def verify(self, digest: str) -> bool:
        """Whether the blob's bytes still have its digest. Reads all of it; `BlobMissing` if there is none."""

    def inventory(self) -> Iterator[Blob]:
        """Every published blob, in order of digest's first byte."""

    def strays(self) -> Iterator[str]:
        """What lies among the published blobs and is none. No reader ever sees it."""

    def stages(self) -> Iterator[Stage]:
        """Everything staged, what is still being staged included."""

    def remove_stage(self, name: str) -> bool:
        """Remove what was staged, or what has come of it so far; False if it is known to be gone already."""

    def purge_trash(self, age: float) -> int:
        """Remove what has been in the trash for `age` seconds. → how many."""


def open_store(settings: Settings) -> Store:
    """The store that OUTBOX_BLOBS names. Raises `NotReady` if it names none, or boto3 is missing."""
    place = required(settings.blobs, "OUTBOX_BLOBS")
    if not is_bucket(place):
        return BlobStore(place)
    from outbox.s3 import S3Store  # noqa: PLC0415 - boto3 is loaded only where it is used

    return S3Store(str(place), settings.s3_endpoint)
