"""The blob store in a directory: files by the sha256 of their content, on a local file system.

    <directory>/staging/<log>-<xid>-<random>   durable bytes whose transaction may still be rolled back
    <directory>/objects/ab/ab12…               published blobs: complete, never changed
    <directory>/trash/<epoch>-<id>-<digest>    deleted blobs, until the sweeper purges them

Who calls what:

* The application calls `stage` inside its transaction, before the intent is written, and `open` at any time.
* The worker (`workers.blob`) publishes by `workers.publication`: a hard link from the staged file, never a copy.
* The sweeper (`workers.sweeper`) removes staged files whose transaction came to nothing.

The staged file is durable when `stage` returns. A failed fsync is never repeated on the same file, because
the kernel may have dropped the pages and would report success.

Nothing here follows a symbolic link inside the store, and no path is ever made from a caller's text other
than a checked digest or stage. The application and the worker run as one user (Linux lets nobody else link
to a file that he can't write), and the store is on one file system.

Errors: `BlobRefused` when bytes can't be staged, `BlobMissing` when a blob isn't published. What the store's
file system refuses to the worker comes out as OSError.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
import uuid
from binascii import b2a_base64
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from outbox.errors import BlobRefused, Permanent, StoreRefused
from outbox.failpoint import hit
from outbox.source import Readable, Source, reading

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOG = re.compile(r"[0-9a-f]{16}")
_STAGE = re.compile(r"([0-9a-f]{16})-([1-9]\d{0,18})-[0-9a-f]{32}")
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Read-only for everyone: a blob is never changed once it is complete.
FILE_MODE = 0o440
FOLDER_MODE = 0o750


class BlobMissing(Permanent):
    """There is no published blob of this digest."""


class Blob(NamedTuple):
    """A published blob."""

    #: sha256 of the content, 64 hex digits.
    digest: str
    size: int


class Staged(NamedTuple):
    """Bytes that are durable in the store, and not published yet."""

    digest: str
    size: int
    #: Name of the file in the staging folder.
    stage: str

    def payload(self, *, name: str = "", type: str = "") -> dict[str, Any]:  # noqa: A002 - as in HTTP
        """The payload of the intent `blob` `put` (its key is the digest). `name` and `type` are metadata."""
        return {**self._asdict(), "name": name, "type": type}


class Inline(NamedTuple):
    """The bytes of a small blob, which travel in the intent instead of being staged."""

    digest: str
    size: int
    content: bytes

    def payload(self, *, name: str = "", type: str = "") -> dict[str, Any]:  # noqa: A002 - as in HTTP
        """As `Staged.payload`."""
        encoded = b2a_base64(self.content, newline=False).decode()
        return {"digest": self.digest, "size": self.size, "bytes": encoded, "name": name, "type": type}


class Stage(NamedTuple):
    """A file in the staging folder, as the sweeper sees it."""

    name: str
    #: Identity of the log that its transaction belongs to.
    log: str
    #: The transaction that staged it.
    xid: int


class BlobStore:
    """A directory of blobs. Making the object does nothing yet; any number of threads may share it."""

    #: Looking costs one listing of a folder.
    sweep_every = 5.0

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self._made = False

    def make(self) -> None:
        """Make the store's folders where they are missing; durable when it returns."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(FOLDER_MODE, exist_ok=True)
            _sync_path(path.parent)
        for name in ("objects", "staging", "trash", "lanes"):
            (self.directory / name).mkdir(FOLDER_MODE, exist_ok=True)
        # Always, not only for what is new: a process that made them may have died before its fsync.
        _sync_path(self.directory / "objects")
        _sync_path(self.directory)
        _sync_path(self.directory.parent)
        self._made = True

    # ------------------------------------------------------------------------------- the application's

    def stage(
        self, source: Readable, *, xid: int, log: str, size: int | None = None, limit: int | None = None
    ) -> Staged:
        """Copy `source` (a path, bytes, or a binary file) into the store; durable when it returns.

        `xid` is the current transaction (`pg_current_xact_id()`) and `log` the log's identity: by them the
        sweeper learns what became of the file. `size` is the size that the caller expects, `limit` the
        largest that he accepts. Memory is constant. Raises `BlobRefused`, and leaves nothing behind, when
        the source can't be read, has another size, or the store can't hold it.
        """
        name = stage_name(log, xid)
        with reading(source, size, limit) as content:
            try:
                if not self._made:
                    self.make()
                with self.folder("staging") as folder:
                    try:
                        _write(folder, name, content)
                        hit("blob.written")
                        os.fsync(folder)
                    except BaseException:
                        with suppress(OSError):
                            os.unlink(name, dir_fd=folder)
                        raise
            except OSError as error:
                raise _store_refuses(error) from error
        return staged(content, name)

    def open(self, digest: str) -> BufferedReader:
        """A published blob, to read. It stays readable while it is open, even when it is deleted meanwhile."""
        check_digest(digest)
        try:
            with self.folder("objects", digest[:2]) as folder:
                file = os.open(digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise missing() from None
            raise
        return os.fdopen(file, "rb")

    def size(self, digest: str) -> int | None:
        """Bytes of a published blob; None if there is none."""
        check_digest(digest)
        try:
            with self.folder("objects", digest[:2]) as folder:
                size = plain_size(folder, digest)
        except FileNotFoundError:
            return None
        return None if size is None or size < 0 else size

    def exists(self, digest: str) -> bool:
        """Whether the blob is published."""
        return self.size(digest) is not None

    def path(self, digest: str) -> Path:
        """Where the blob is or would be, for a web server that sends files. Never write to it."""
        check_digest(digest)
        return self.directory / "objects" / digest[:2] / digest

    # ------------------------------------------------------------------------------------- the worker's

    def verify(self, digest: str) -> bool:
        """Whether the blob's bytes still have its digest. Reads all of it; `BlobMissing` if there is none."""
        with self.open(digest) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    def inventory(self) -> Iterator[Blob]:
        """Every published blob, in order of digest's first byte. What isn't a blob is passed over."""
        try:
            with self.folder("objects") as objects:
                folders = sorted(name for name in os.listdir(objects) if re.fullmatch("[0-9a-f]{2}", name))
        except FileNotFoundError:  # nothing was published yet
            return
        for prefix in folders:
            with self.folder("objects", prefix) as folder:
                found = [(name, plain_size(folder, name)) for name in os.listdir(folder) if _DIGEST.fullmatch(name)]
            for name, size in found:
                if size is not None and size >= 0 and name[:2] == prefix:
                    yield Blob(name, size)

    def strays(self) -> Iterator[str]:
        """What lies among the objects and is no blob, as paths from there. No reader ever sees it."""
        with suppress(FileNotFoundError), self.folder("objects") as objects:
            for prefix in sorted(os.listdir(objects)):
                if not re.fullmatch("[0-9a-f]{2}", prefix):
                    yield prefix
                    continue
                with self.folder("objects", prefix) as folder:
                    names = [n for n in os.listdir(folder) if not _DIGEST.fullmatch(n) or n[:2] != prefix]
                yield from (f"{prefix}/{name}" for name in sorted(names))

    # ------------------------------------------------------------------------------------ the sweeper's

    def stages(self) -> Iterator[Stage]:
        """Every staged file. What has another kind of name is not the store's, and is passed over."""
        try:
            with self.folder("staging") as folder:
                names = os.listdir(folder)
        except FileNotFoundError:  # nobody has staged anything yet
            return
        yield from filter(None, map(parse_stage, names))

    def remove_stage(self, name: str) -> bool:
        """Remove a staged file; False if it is gone already. Its published blob, if any, stays."""
        check_stage(name)
        try:
            with self.folder("staging") as folder:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    def purge_trash(self, age: float) -> int:
        """Remove what has been in the trash for `age` seconds. → how many."""
        purged = 0
        with suppress(FileNotFoundError), self.folder("trash") as folder:
            for name in os.listdir(folder):
                with suppress(FileNotFoundError):
                    # A rename sets ctime, so it is the time of the deletion.
                    if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime >= age:
                        os.unlink(name, dir_fd=folder)
                        purged += 1
                        hit("sweep.purged")
        return purged

    @contextmanager
    def folder(self, *names: str) -> Iterator[int]:
        """A descriptor of a folder of the store; a symbolic link in its place is refused."""
        file = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in names:
                parent, file = file, os.open(name, FOLDER, dir_fd=file)
                os.close(parent)
            yield file
        finally:
            os.close(file)


def check_digest(digest: str) -> None:
    """Raises `BlobRefused` unless it is 64 lower-case hex digits."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise BlobRefused("this is not the digest of a blob: give its sha256 as 64 lower-case hex digits")


def stage_name(log: str, xid: int) -> str:
    """A new name for a staged file of a transaction."""
    if not _LOG.fullmatch(log) or not 0 < xid < 10**19:
        raise ValueError("log or xid is not of this database: take them from outbox.identity and the transaction")
    return f"{log}-{xid}-{uuid.uuid4().hex}"


def parse_stage(name: str) -> Stage | None:
    """What the name of a staged file tells; None for any other name."""
    match = _STAGE.fullmatch(name)
    return Stage(name, match[1], int(match[2])) if match else None


def staged(content: Source, name: str) -> Staged:
    """What a store answers when all that came from `content` is durable under `name`."""
    hit("blob.staged")
    return Staged(content.digest, content.size, name)


def is_stage(name: object) -> bool:
    """Whether it is the name of a staged file."""
    return isinstance(name, str) and _STAGE.fullmatch(name) is not None


def check_stage(name: str) -> None:
    """Raises ValueError unless it is the name of a staged file."""
    if not is_stage(name):
        raise ValueError("not the name of a staged file: take it from stages() or from an intent")


def _write(folder: int, name: str, content: Source) -> None:
    """Write a staged file and fsync it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, FILE_MODE, dir_fd=folder)
    try:
        for piece in content:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def plain_size(folder: int, name: str) -> int | None:
    """Bytes of a file; None if there is none, -1 for anything that is not a plain file."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _sync_path(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def missing() -> BlobMissing:
    """The error of a reader."""
    return BlobMissing(
        "no blob of this digest is published: wait for its transaction with outbox.wait, and look at `outbox status`"
    )


def _store_refuses(error: OSError) -> StoreRefused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreRefused("the blob store has no room for this blob: make room there, then stage it again")
    reason = os.strerror(error.errno or 0)
    return StoreRefused(f"the blob store can't be written ({reason}): repair its file system, then stage it again")
