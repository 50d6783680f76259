"""Publishing: a batch of changes to the blobs that readers see.

`workers.blob` calls it. Nothing is copied: a staged file gets a second name among the objects, a deleted
blob gets another name in the trash. The changes are durable when `sync` returns, and not before.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Self

from outbox.blob import FOLDER, FOLDER_MODE, BlobMissing, BlobStore, Staged, check_digest, plain_size
from outbox.errors import BlobRefused
from outbox.failpoint import hit


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

    def put(self, staged: Staged) -> None:
        """Publish a staged file, by a hard link.

        Raises `BlobMissing` when the staged file is gone and the blob isn't published either, `BlobRefused`
        when the staged file is not what was staged.
        """
        digest, size, stage = staged
        folder = self._shelf(digest)
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

    def delete(self, digest: str, *, epoch: int, id: int) -> bool:  # noqa: A002 - the intent's
        """Move a blob into the trash. → whether it was there."""
        folder = self._shelf(digest)
        name = f"{epoch}-{id}-{digest}"
        # rename() of two names of one file does nothing and reports success: an earlier try may have left
        # the other name.
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._trash)
        try:
            os.rename(digest, name, src_dir_fd=folder, dst_dir_fd=self._trash)
        except FileNotFoundError:
            return False
        hit("blob.deleted")
        self._touched["trash"] = self._trash
        self._undo.append(lambda: os.rename(name, digest, src_dir_fd=self._trash, dst_dir_fd=folder))
        return True

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
