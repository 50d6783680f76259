"""One shard of the index: a Xapian database that one lane writes.

Called by `workers.index`. The shard of lane 0 is the folder `00` of the index's directory, and so on.

What is durable: everything written inside `transaction` when that returns, all of it or nothing. Xapian
renames its new version file into place without syncing the folder: after two such renames lost in a power
cut the shard can't be opened any more. So the folder is synced after each commit, before anything else is
written; and when the shard is opened, because its last owner may have died between the two.

Fencing: the shard stores the highest epoch that has opened it; a lower one is refused. Xapian's own lock
keeps a second writer out meanwhile, also one that survives as a forked child: a process that has a shard
open must never fork.

The shard also stores which slots of keys it is for. Under others its position would be a lie about the keys that
were not its own: a shard that was swapped with another one, or is of another number of lanes, is refused
unless it is empty, in which case it begins anew.

Files that are put in the place of an open shard (a copy restored while the worker runs) are noticed before the
next write, and left as they are: `Fenced`, so that the lane is claimed anew and goes on from *their* position.

Errors: `Unavailable` when the shard can't be opened or written (disk full, locked, damaged), `Fenced`,
`NotThisLane`. After any failure the handle is dropped, because Xapian doesn't promise its state after a failed
commit; the next use opens the shard anew.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from outbox.errors import Fenced, NotThisLane, NotThisLog, Unavailable
from outbox.failpoint import hit
from outbox.participant import Item
from outbox.quiet import Writing
from outbox.search import FIELDS

with warnings.catch_warnings():
    # SWIG's types have no __module__, which newer Pythons deprecate.
    warnings.simplefilter("ignore", DeprecationWarning)
    import xapian

__all__ = [
    "EPOCH",
    "FORMAT",
    "POSITION",
    "SLOTS",
    "Shard",
    "format_of",
    "inventory",
    "new_generator",
    "numbers",
    "overtaken",
    "xapian",
]

EPOCH = "outbox.epoch"
"""Name of the metadata that holds the highest epoch that has opened the shard."""

POSITION = "outbox.position"
"""Name of the metadata that holds the lane's position."""

SLOTS = "outbox.slots"
"""Name of the metadata that holds the first and the last slot of the shard's keys, as `0-16383`."""

FORMAT = "outbox.format"
"""Name of the metadata that holds what the documents were made as (`workers.index.format_of_documents`)."""

SLICE = 500
"""Documents read at a time by `inventory`, between looks whether the shard has moved on."""


class Shard:
    """A shard and the right to write it. Not thread-safe."""

    def __init__(self, path: Path, epoch: int, slots: tuple[int, int] = (0, 16383), made_as: str = "") -> None:
        """`made_as`: the format of the documents that a new shard will have."""
        self.path = path
        self._made_as = made_as
        self._slots = "{}-{}".format(*slots)
        #: Keyword fields that some document of this shard has or had.
        self.fields: frozenset[str] = frozenset()
        self._epoch = epoch
        self._db: Any = None
        self._folder = -1
        # The version file that this handle has read or written last.
        self._version: tuple[int, ...] | None = None
        self._generators: dict[str, Any] = {}
        self._writing = Writing()

    def database(self) -> Any:
        """The xapian.WritableDatabase, made or opened if there is no handle.

        Raises `Unavailable`, `Fenced`, `NotThisLane`.
        """
        if self._db is None:
            try:
                self._open()
            except (Fenced, NotThisLog):
                self.drop()
                raise
            except xapian.DatabaseLockError as error:
                self.drop()
                raise Unavailable(
                    f"another process writes the index shard {self.path}: stop it, or wait until it has ended"
                ) from error
            except (xapian.DatabaseError, ValueError) as error:
                self.drop()
                raise self.damaged(error) from error
            except OSError as error:
                self.drop()
                raise Unavailable(
                    f"the index shard {self.path} can't be opened ({error.strerror}): see to its disk and its owner"
                ) from error
        return self._db

    def _open(self) -> None:
        os.makedirs(self.path.parent, exist_ok=True)
        if not self.path.exists() or not os.listdir(self.path):
            self._make()
        self._db = xapian.WritableDatabase(str(self.path), xapian.DB_OPEN)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(self._folder)
        # Losing a whole new shard would be harmless, it is filled from the beginning; so this may be denied.
        for parent in (self.path.parent, self.path.parent.parent):
            with suppress(PermissionError):
                _sync(parent)
        slots = self._db.get_metadata(SLOTS).decode()
        if slots not in ("", self._slots) and self._db.get_doccount():
            raise NotThisLane(
                f"the index shard {self.path} holds the slots {slots} of the keys, and its lane has {self._slots}: "
                "it was swapped with another shard, or written under another number of lanes. Nothing was changed. "
                f"Either put the lane's own shard in its place, or {self.remedy}"
            )
        epoch = int(self._db.get_metadata(EPOCH) or 0)
        if epoch > self._epoch:
            raise Fenced(
                f"the index shard {self.path} was opened under epoch {epoch}, this is {self._epoch}: "
                "claim the lane again"
            )
        self.fields = frozenset(self._db.get_metadata(FIELDS).decode().split())
        if epoch < self._epoch or slots != self._slots:
            self._claim(begin_anew=slots not in ("", self._slots))
        self._version = self._look()

    def _make(self) -> None:
        """An empty shard, under another name first: half-made by an owner that died, it could never be opened."""
        for left in self.path.parent.glob(f"{self.path.name}.*.new"):
            shutil.rmtree(left)
        new = self.path.with_name(f"{self.path.name}.{self._epoch}.new")
        xapian.WritableDatabase(str(new), xapian.DB_CREATE).close()
        _sync(new)
        hit("index.made")
        os.rename(new, self.path)

    def _claim(self, *, begin_anew: bool) -> None:
        hit("index.opened")
        # At once, not with the first documents: nothing of an owner before may come between.
        self._db.begin_transaction()
        self._db.set_metadata(EPOCH, str(self._epoch))
        self._db.set_metadata(SLOTS, self._slots)
        if begin_anew:
            self._db.set_metadata(POSITION, "")
        if begin_anew or not self._db.get_metadata(FORMAT):
            # Shards of before there were formats were all made as the first version did.
            self._db.set_metadata(FORMAT, self._made_as)
        self._db.commit_transaction()
        hit("index.epoch")
        os.fsync(self._folder)

    @property
    def remedy(self) -> str:
        """What to do about a shard that is not of this log or lane."""
        return (
            f"move the shard away (mv {self.path} {self.path}.refused), and it is filled again from this log; or build "
            "the index anew while this one serves (outbox resilver index)"
        )

    def _look(self) -> tuple[int, ...] | None:
        """What tells the version file at the shard's path from any other: each commit makes a new one."""
        try:
            found = os.stat(self.path / "iamglass")
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """What is written to the database yielded is durable at the end, or was never there."""
        db = self.database()
        if self._look() != self._version:
            self.drop()
            raise Fenced(
                f"the index shard {self.path} was replaced under its worker: the lane is claimed again, and goes on "
                "from the position of what is there now"
            )
        try:
            db.begin_transaction()
            yield db
            hit("index.documents")
            with self._writing.commit(self._folder):
                db.commit_transaction()
            hit("index.committed")
            os.fsync(self._folder)
            self._version = self._look()
        except (xapian.DatabaseError, OSError) as error:
            # After a failed fsync the batch comes again, and with it a new rename: the sync alone is never repeated.
            self.drop()
            raise Unavailable(
                f"the index shard {self.path} can't be written ({type(error).__name__}: {error}): "
                "see to its disk, the lane then goes on by itself"
            ) from error
        except BaseException:
            self.drop()
            raise

    def generator(self, language: str) -> Any:
        """The xapian.TermGenerator of a language."""
        found = self._generators.get(language)
        if found is None:
            found = self._generators[language] = new_generator(language)
        return found

    def know(self, fields: frozenset[str]) -> None:
        """Inside a transaction: remember the keyword fields for the readers of the index."""
        self._db.set_metadata(FIELDS, " ".join(sorted(fields)))
        # If the transaction fails, the handle is dropped, and the fields are read again.
        self.fields = fields

    def damaged(self, error: Exception) -> Unavailable:
        """What to say when the shard holds something unexpected."""
        return Unavailable(
            f"the index shard {self.path} can't be opened ({type(error).__name__}: {error}): "
            "if its disk is well, move it away, and it is filled again from the log; or build the index anew "
            "(outbox resilver index)"
        )

    def drop(self) -> None:
        """Let go of the files. What was committed stays, the rest is forgotten."""
        db, self._db = self._db, None
        folder, self._folder = self._folder, -1
        if db is not None:
            # In this order: closing would commit what is pending.
            with suppress(xapian.Error):
                db.cancel_transaction()
            with suppress(xapian.Error):
                db.close()
        if folder >= 0:
            os.close(folder)


def new_generator(language: str) -> Any:
    """What makes terms of texts in a language."""
    made = xapian.TermGenerator()
    made.set_stemmer(xapian.Stem(language))
    made.set_flags(xapian.TermGenerator.FLAG_CJK_NGRAM)
    return made


def format_of(path: Path) -> str | None:
    """The format that a shard was made with; None if it can't be read, or has never had an owner."""
    try:
        db = xapian.Database(str(path))
        found: str = db.get_metadata(FORMAT).decode()
        db.close()
    except xapian.DatabaseError:
        return None
    return found or None


def inventory(path: Path) -> Iterator[Item]:
    """Every document of a shard; reads beside any writer.

    A key that is put while this runs may be missed or told twice. Raises `Unavailable`.
    """
    try:
        db = xapian.Database(str(path))
        after = 0
        while True:
            try:
                items, after = _slice(db, after)
            except (xapian.DatabaseModifiedError, xapian.DatabaseCorruptError) as error:
                overtaken(db, error)
                continue
            yield from items
            if not items:
                return
    except xapian.DatabaseError as error:
        raise Unavailable(
            f"the index shard {path} can't be read ({type(error).__name__}: {error}): see to its disk"
        ) from error


def overtaken(db: Any, error: Exception) -> None:
    """After an error of reading: move on to the newest commit. Raises it again when there is no newer one.

    A commit writes into blocks that the one before the last has left, and whoever still reads that one may find what
    looks like damage. If nothing was committed since, it is.
    """
    if not db.reopen() and not isinstance(error, xapian.DatabaseModifiedError):
        raise error


def _slice(db: Any, after: int) -> tuple[list[Item], int]:
    """Up to SLICE documents whose number is above `after`, and the number of the last one."""
    items: list[Item] = []
    for number in numbers(db, after):
        record = json.loads(db.get_document(number).get_data())
        items.append(Item(record["key"], record["digest"], record["id"]))
        after = number
        if len(items) == SLICE:
            break
    return items, after


def numbers(db: Any, after: int) -> Iterator[int]:
    """The numbers of the documents above `after`."""
    postings = db.postlist("")
    try:
        posting = postings.skip_to(after + 1)
        while True:
            yield posting.docid
            posting = next(postings)
    except StopIteration:
        return


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
