"""The demonstration's application: an ordinary one, that uses the outbox like any other would.

For each file one ORM transaction writes a row, its blob and its document; for each folder that is done one
transaction writes its row and starts the saga that publishes it. Every 20th is rolled back on purpose. When the
database goes away, the application does what it should: asks whether its last transaction committed, and if not does
it again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Settings, Token
from outbox.blob import Blob
from outbox.errors import BlobRefused
from workers.demo.model import Base, File, Folder
from workers.demo.publish import Listing, publish, refused

ROLLBACK_EVERY = 20
"""Each so-many-th transaction is rolled back on purpose."""

TEXT_LIMIT = 40_000
"""Bytes of a file's text that are indexed: a document travels in the log, whose payloads are small."""

PATIENCE = 60.0
"""Seconds that the application waits for a database that was stopped."""


class OnPurpose(Exception):
    """Rolls a transaction back."""


@dataclass(slots=True)
class Expected:
    """What committed, and so must be found at the participants, each once; nothing else may."""

    documents: set[str] = field(default_factory=set)
    blobs: set[str] = field(default_factory=set)
    #: Folders whose saga was started; what is to be found of one depends on whether it is refused.
    folders: list[Listing] = field(default_factory=list)
    committed: int = 0
    rolled_back: int = 0
    #: Files that could not be read, and so were never written.
    skipped: int = 0
    last: Token | None = None

    @property
    def published(self) -> list[Listing]:
        """Folders that are not refused."""
        return [folder for folder in self.folders if not refused(folder.path)]


class Written(NamedTuple):
    """What a transaction leaves at the participants if it commits."""

    document: str | None = None
    blob: str | None = None
    folder: Listing | None = None


def files(path: Path, count: int | None) -> list[Path]:
    """The regular files below `path`, folder by folder; at most `count`."""
    found: list[Path] = []
    for file in _walk(path):
        found.append(file)
        if count is not None and len(found) == count:
            break
    return found


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    yield from (entry for entry in entries if entry.is_file() and not entry.is_symlink())
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and entry.name not in ("__pycache__", "site-packages"):
            yield from _walk(entry)


class Traffic:
    """The application. `run` writes everything; what committed is in `expected`."""

    def __init__(self, settings: Settings, root: Path, chosen: list[Path]) -> None:
        self.engine = sa.create_engine(settings.sqlalchemy_url, pool_pre_ping=True)
        self.sessions = sessionmaker(self.engine)
        self.outbox = Outbox(self.sessions, settings)
        self.root = root
        self.chosen = chosen
        self.expected = Expected()
        self._number = 0

    def run(self, done: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Write all files; `done` is called after each."""
        Base.metadata.drop_all(self.engine)
        Base.metadata.create_all(self.engine)
        names: list[str] = []
        for file, following in zip(self.chosen, [*self.chosen[1:], None], strict=True):
            if stopped():
                return
            try:
                if self._transact(partial(self._file, file=file)):
                    names.append(_name(file.name))
            except BlobRefused:
                self.expected.skipped += 1
            if following is None or following.parent != file.parent:
                self._transact(partial(self._folder, path=_name(file.parent.relative_to(self.root)), names=names))
                names = []
            done()

    def _transact(self, work: Callable[[Session], Written]) -> bool:
        """One transaction, again after a lost database. → whether it committed; False if rolled back on purpose."""
        self._number += 1
        on_purpose = self._number % ROLLBACK_EVERY == 0
        deadline = time.monotonic() + PATIENCE
        while True:
            session = self.sessions()
            written = Written()
            try:
                with session, session.begin():
                    written = work(session)
                    if on_purpose:
                        # Halfway: rows and intents are in the database, and still must leave no trace.
                        session.flush()
                        with session.begin_nested():
                            pass
                        raise OnPurpose  # noqa: TRY301 - this is how an application's error comes
            except OnPurpose:
                self.expected.rolled_back += 1
                return False
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
                if not self._committed(self.outbox.token(session), deadline):
                    continue
            self.expected.committed += 1
            if written.document and written.blob:
                self.expected.documents.add(written.document)
                self.expected.blobs.add(written.blob)
            if written.folder:
                self.expected.folders.append(written.folder)
            self.expected.last = self.outbox.token(session)
            return True

    def _committed(self, token: Token | None, deadline: float) -> bool:
        """Ask, once the database is back, whether the transaction whose COMMIT got no answer did commit."""
        while token is not None:
            try:
                with self.sessions() as session:
                    verdict = self.outbox.committed(session, token)
                if verdict is not None:
                    return verdict
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
        time.sleep(0.1)
        return False

    def _file(self, session: Session, file: Path) -> Written:
        path = _name(file.relative_to(self.root))
        key = f"file/{path}"
        blob: Blob = self.outbox.blobs.put(session, file, name=_name(file.name))
        session.add(File(path=path, digest=blob.digest, size=blob.size))
        with file.open("rb") as content:
            text = content.read(TEXT_LIMIT).decode("utf-8", "replace")
        self.outbox.index.put(
            session,
            key,
            title=_name(file.name),
            text=_words(text),
            keywords={"folder": _name(file.parent.relative_to(self.root))},
            data={"digest": blob.digest, "size": blob.size},
        )
        return Written(key, blob.digest)

    def _folder(self, session: Session, path: str, names: list[str]) -> Written:
        session.add(Folder(path=path, files=len(names)))
        manifest = json.dumps({"folder": path, "files": names}).encode()
        folder = Listing(path, len(names), self.outbox.blobs.stage(session, manifest, name="manifest.json"))
        publish.start(session, folder, key=path)
        return Written(folder=folder)


def _name(path: str | Path) -> str:
    """A file's name as text: on disk it is bytes, and need not be any text at all."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _words(text: str) -> str:
    """A file's text for the index: what is no character is no word, and JSON writes it in six bytes."""
    words = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return words.encode()[:TEXT_LIMIT].decode("utf-8", "ignore")
