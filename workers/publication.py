"""Publishing in a directory: a batch of changes to the blobs that readers see.

`workers.blob` calls it. Nothing is copied: a staged file gets a second name among the objects, a deleted
blob gets another name in the trash. The links of a batch are made, then each folder is fsynced once; they are
durable when `sync`, or the block of `batch`, is left.

Fencing: each lane has a lock file in the store with the highest epoch that opened it. A batch is linked
under that lock, so an owner who was suspended through a takeover changes nothing when he wakes up (`Fenced`).

Trouble of the file system comes out as OSError.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from outbox.blob import FILE_MODE, FOLDER, FOLDER_MODE, BlobMissing, BlobStore, Inline, Staged, check_digest, plain_size
from outbox.errors import BlobRefused, Fenced, Unavailable
from outbox.failpoint import hit
from outbox.participant import LaneView

LOCK_WAIT = 2.0
"""Seconds to wait for a lane's lock. An owner holds it for the links of one batch: some milliseconds."""


class DirectoryPublisher:
    """What a lane's owner may do to the blobs of a directory."""

    #: A link takes less time than a thread.
    threads = 1

    def __init__(self, store: BlobStore, lane: LaneView) -> None:
        """Take the lane's fence. Raises `Fenced` if a newer owner has it."""
        store.make()
        self._store = store
        self._fence = Fence(store, lane)

    @contextmanager
    def batch(self) -> Iterator[Publication]:
        """Changes, durable when the block is left."""
        with Publication(self._store) as publication:
            with self._fence.held():
                yield publication
            hit("blob.linked")
            try:
                publication.sync()
            except OSError:
                # The next try must change the folders anew: a second fsync of the same change proves nothing.
                with self._fence.held():
                    publication.undo()
                raise

    def settle(self, stages: Sequence[str]) -> None:
        """Remove staged files that are published."""
        for stage in stages:
            self._store.remove_stage(stage)
            hit("blob.settled")

    def close(self) -> None:
        """Let go of the lane's lock file."""
        self._fence.close()


class Publication:
    """A batch of changes to the published blobs: visible at once, durable when `sync` returns.

    Every change can be made again: a blob that is there already is compared, one that is gone already
    is gone. OSError from any method means that the store is in trouble, not the blob.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._stack = ExitStack()
        self._touched: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._staging = stack.enter_context(self._store.folder("staging"))
            self._objects = stack.enter_context(self._store.folder("objects"))
            self._trash = stack.enter_context(self._store.folder("trash"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, content: Staged | Inline) -> None:
        """Publish a staged file, by a hard link, or small bytes.

        Raises `BlobMissing` when the staged file is gone and the blob isn't published either, `BlobRefused`
        when the staged file is not what was staged.
        """
        folder = self._shelf(content.digest)
        if isinstance(content, Inline):
            self._write(folder, content)
        else:
            self._link(folder, content)

    def _write(self, folder: int, inline: Inline) -> None:
        digest, size, content = inline
        if plain_size(folder, digest) == size:
            return
        name = f"new-{uuid.uuid4().hex}"  # left in the trash by a crash, it is purged
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, FILE_MODE, dir_fd=self._trash)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(name, digest, src_dir_fd=self._trash, dst_dir_fd=folder)
        self._undo.append(lambda: os.unlink(digest, dir_fd=folder))

    def _link(self, folder: int, staged: Staged) -> None:
        digest, size, stage = staged
        found = plain_size(self._staging, stage)
        if found is None:
            if plain_size(folder, digest) != size:
                raise BlobMissing(
                    "the staged file is gone and the blob is not published: stage its bytes again in a new "
                    "transaction, then skip this intent"
                )
        elif found != size:
            raise BlobRefused(
                "the staged file is not the one that was staged (another size or kind): stage the bytes again in "
                "a new transaction, then skip this intent"
            )
        else:
            try:
                os.link(stage, digest, src_dir_fd=self._staging, dst_dir_fd=folder, follow_symlinks=False)
                hit("blob.put")
                self._undo.append(lambda: os.unlink(digest, dir_fd=folder))
            except FileExistsError:
                if plain_size(folder, digest) != size:
                    self._replace(folder, staged)

    def delete(self, digest: str, *, epoch: int, id: int) -> None:  # noqa: A002 - the intent's
        """Move a blob into the trash; it may not be there."""
        folder = self._shelf(digest)
        name = f"{epoch}-{id}-{digest}"
        # rename() of two names of one file does nothing and reports success: an earlier try may have left
        # the other name.
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._trash)
        try:
            os.rename(digest, name, src_dir_fd=folder, dst_dir_fd=self._trash)
        except FileNotFoundError:
            return
        hit("blob.deleted")
        self._touched["trash"] = self._trash
        self._undo.append(lambda: os.rename(name, digest, src_dir_fd=self._trash, dst_dir_fd=folder))

    def sync(self) -> None:
        """Make every change durable: one fsync for each folder that was touched, changed now or before.

        Raises OSError if one of them fails; then call `undo`, so that a next try has something to write and
        doesn't merely repeat the fsync.
        """
        for folder in self._touched.values():
            os.fsync(folder)
            hit("blob.synced")

    def undo(self) -> None:
        """Take back what this object changed, as far as the file system lets it."""
        while self._undo:
            with suppress(OSError):
                self._undo.pop()()

    def _replace(self, folder: int, staged: Staged) -> None:
        """Put the staged file in the place of a damaged one; readers see the one or the other."""
        name = f"new-{uuid.uuid4().hex}"  # left in the trash by a crash, it is purged
        os.link(staged.stage, name, src_dir_fd=self._staging, dst_dir_fd=self._trash, follow_symlinks=False)
        hit("blob.replaced")
        os.rename(name, staged.digest, src_dir_fd=self._trash, dst_dir_fd=folder)

    def _shelf(self, digest: str) -> int:
        """The folder of a blob, which is made when it is missing."""
        check_digest(digest)
        prefix = digest[:2]
        if prefix not in self._touched:
            try:
                folder = os.open(prefix, FOLDER, dir_fd=self._objects)
            except FileNotFoundError:
                os.mkdir(prefix, FOLDER_MODE, dir_fd=self._objects)
                hit("blob.shelved")
                # A crash before this is made good by the next owner's `make`.
                os.fsync(self._objects)
                folder = os.open(prefix, FOLDER, dir_fd=self._objects)
            self._stack.callback(os.close, folder)
            self._touched[prefix] = folder
        return self._touched[prefix]


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
