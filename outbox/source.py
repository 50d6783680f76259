"""The bytes of a blob on their way into a store: read piece by piece, hashed, counted.

A store's `stage` iterates over a `Source` and writes what comes; when the iteration is over, `digest` and `size`
are those of everything that came. Memory is constant. Nothing is durable here.

Errors: `BlobRefused` when the source can't be read, gives no bytes, or has another size than was declared.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Self

from outbox.errors import BlobRefused

CHUNK = 1024 * 1024
"""Bytes read, hashed and written at a time: what staging needs of memory, whatever the blob's size."""


class Source:
    """A path, bytes, or a binary file from where it stands. Used as a context, iterated over once."""

    def __init__(self, source: Readable, *, size: int | None = None, limit: int | None = None) -> None:
        """`size` is the size that is expected, `limit` the largest that is accepted; in bytes."""
        if limit is not None and size is not None and size > limit:
            raise BlobRefused(f"the blob is declared with {size:,} bytes, the limit is {limit:,}: send less")
        self._source = source
        self._size = size
        self._limit = limit
        self._sha = hashlib.sha256()
        self._stack = ExitStack()
        #: Bytes that came so far.
        self.size = 0
        #: Bytes that will come, if it is known beforehand.
        self.expected = size

    @property
    def digest(self) -> str:
        """sha256 of what came so far."""
        return self._sha.hexdigest()

    def __enter__(self) -> Self:
        source = self._source
        if isinstance(source, bytes | bytearray | memoryview):
            view = memoryview(source).cast("B")
            self._pieces: Iterator[bytes | memoryview] = (
                view[start : start + CHUNK] for start in range(0, len(view), CHUNK)
            )
            self.expected = len(view)
        else:
            assert not isinstance(source, Source)  # noqa: S101 - `reading` sees to that
            self._pieces = _read(self._file(source) if isinstance(source, str | os.PathLike) else source)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, if it was opened here."""
        self._stack.close()

    def whole(self, limit: int) -> bytes | None:
        """All of the bytes, if they are `limit` at most; None otherwise, and nothing is lost by having looked."""
        if not limit or (self.expected or 0) > limit:
            return None
        head, found = list[bytes | memoryview](), 0
        for piece in self._pieces:
            head.append(piece)
            found += len(piece)
            if found > limit:
                self._pieces = chain(head, self._pieces)
                return None
        self._pieces = iter(head)
        return b"".join(self)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in self._pieces:
            self.size += len(piece)
            if self._limit is not None and self.size > self._limit:
                raise BlobRefused(f"the blob is over the limit of {self._limit:,} bytes: send less")
            if self._size is not None and self.size > self._size:
                raise BlobRefused(f"the blob is longer than the declared {self._size:,} bytes: declare its real size")
            self._sha.update(piece)
            yield piece
        if self._size is not None and self.size < self._size:
            raise BlobRefused(
                f"the blob ended after {self.size:,} of the declared {self._size:,} bytes: send all of it, "
                "or declare its real size"
            )

    def _file(self, path: str | os.PathLike[str]) -> BinaryIO:
        try:
            # Not blocking, so that a pipe is refused and not waited for.
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._stack.callback(os.close, file)
            found = os.fstat(file)
        except OSError as error:
            raise _refused(error) from error
        if not stat.S_ISREG(found.st_mode):
            raise BlobRefused("the file to stage is a folder, a pipe or a device: give a plain file")
        self.expected = found.st_size
        return os.fdopen(file, "rb", buffering=0, closefd=False)


#: A path, the bytes themselves, or a binary file open for reading.
Bytes = str | Path | bytes | BinaryIO

Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Source


def reading(source: Readable, size: int | None, limit: int | None) -> AbstractContextManager[Source]:
    """A source to iterate over; one that is open already stays open."""
    return nullcontext(source) if isinstance(source, Source) else Source(source, size=size, limit=limit)


def _read(source: BinaryIO) -> Iterator[bytes]:
    while True:
        try:
            chunk = source.read(CHUNK)
        except OSError as error:
            raise _refused(error) from error
        if not isinstance(chunk, bytes):
            raise BlobRefused("the file to stage gives no bytes: open it in binary, blocking mode")
        if not chunk:
            return
        yield chunk


def _refused(error: OSError) -> BlobRefused:
    return BlobRefused(f"the file to stage can't be read ({os.strerror(error.errno or 0)}): make it readable")
