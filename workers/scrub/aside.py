"""What a store still has of a blob, and where damaged ones are put: the repair's dealings with the store itself.

    <store>/aside/<digest>-<random>     what was published under a digest and was not its blob, and orphans that the
                                        log has never heard of; nothing ever removes it. In a bucket, the version
                                        stands in the place of the random part.

`set_aside` moves away what is wrong, so that the lane can publish the right bytes; a reader finds nothing there
meanwhile, instead of wrong bytes. It checks once more what it has moved: a worker may just have put the right blob
there, and then it goes back. Durable when it returns.

Errors: OSError, `Unavailable`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from typing import Protocol

from outbox.blob import FOLDER_MODE, BlobStore, is_stage
from outbox.store import Store


class Aside(Protocol):
    """One store's copies and damaged blobs."""

    def copies(self, digest: str, stage: object) -> Iterator[BufferedReader]:
        """What may have the blob's bytes still, open to be read: what was staged, the trash, older versions."""

    def set_aside(self, digest: str) -> None:
        """Move away what is published under this digest, if it is not its blob."""

    def keep(self, digest: str) -> None:
        """Put a copy aside of what is published under this digest."""


class DirectoryAside:
    """A store in a directory. A copy is another link, and costs nothing."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def copies(self, digest: str, stage: object) -> Iterator[BufferedReader]:
        """From the staging folder, the trash and what was put aside."""
        if is_stage(stage):
            yield from self._opened("staging", str(stage))
        for folder in ("trash", "aside"):
            for name in self._names(folder):
                if digest in name:
                    yield from self._opened(folder, name)

    def set_aside(self, digest: str) -> None:
        """By a rename."""
        name = f"{digest}-{uuid.uuid4().hex}"
        with self._folders(digest) as (shelf, aside):
            try:
                os.rename(digest, name, src_dir_fd=shelf, dst_dir_fd=aside)
            except FileNotFoundError:
                return
            if _is_blob(aside, name, digest):
                with suppress(FileExistsError):
                    os.link(name, digest, src_dir_fd=aside, dst_dir_fd=shelf, follow_symlinks=False)
                os.fsync(shelf)
                os.unlink(name, dir_fd=aside)
            os.fsync(aside)
            os.fsync(shelf)

    def keep(self, digest: str) -> None:
        """By a link."""
        with self._folders(digest) as (shelf, aside), suppress(FileNotFoundError):
            name = f"{digest}-{uuid.uuid4().hex}"
            os.link(digest, name, src_dir_fd=shelf, dst_dir_fd=aside, follow_symlinks=False)
            os.fsync(aside)

    def _names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError), self._store.folder(folder) as opened:
            return sorted(os.listdir(opened))
        return []

    def _opened(self, folder: str, name: str) -> Iterator[BufferedReader]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with self._store.folder(folder) as opened:
                file = os.open(name, flags, dir_fd=opened)
        except OSError:  # gone meanwhile, or of no use: there may be others
            return
        with os.fdopen(file, "rb") as content:
            if stat.S_ISREG(os.fstat(file).st_mode):
                yield content

    @contextmanager
    def _folders(self, digest: str) -> Iterator[tuple[int, int]]:
        """The folder of the blob, and the one that it is put aside in, which is made when it is missing."""
        with ExitStack() as stack:
            root = stack.enter_context(self._store.folder())
            with suppress(FileExistsError):
                os.mkdir("aside", FOLDER_MODE, dir_fd=root)
            os.fsync(root)
            shelf = aside = stack.enter_context(self._store.folder("aside"))
            # Without a shelf nothing is published, and nothing of this name is found aside either.
            with suppress(FileNotFoundError):
                shelf = stack.enter_context(self._store.folder("objects", digest[:2]))
            yield shelf, aside


def aside_of(store: Store) -> Aside:
    """Of one of the two kinds of store."""
    if isinstance(store, BlobStore):
        return DirectoryAside(store)
    from outbox.s3 import S3Store  # noqa: PLC0415 - boto3 is loaded only where it is used
    from workers.scrub.aside_s3 import BucketAside  # noqa: PLC0415

    assert isinstance(store, S3Store)  # noqa: S101 - there are two
    return BucketAside(store)


def _is_blob(folder: int, name: str, digest: str) -> bool:
    """Whether a file has the blob's bytes. What can't be read hasn't."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(file, "rb") as content:
            return stat.S_ISREG(os.fstat(file).st_mode) and hashlib.file_digest(content, "sha256").hexdigest() == digest
    except OSError:
        return False
