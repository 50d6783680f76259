"""Looks at the participants themselves, not at what the outbox believes about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from email.parser import BytesHeaderParser
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.errors import NotReady
from outbox.settings import Settings, required
from outbox.store import open_store
from workers.demo.model import Published
from workers.demo.publish import HEADER, publish
from workers.demo.report import Report
from workers.demo.traffic import Expected
from workers.index import IndexParticipant


def check(settings: Settings, maildir: Path, expected: Expected, report: Report) -> None:
    """Count what is there into `report`, against what committed."""
    report.committed = expected.committed
    report.rolled_back = expected.rolled_back
    documents = Counter(_documents(required(settings.index, "OUTBOX_INDEX")))
    store = open_store(settings)
    held = list(store.inventory())
    # A blob whose bytes are not what its name says is as good as lost.
    sound = [blob for blob in held if store.verify(blob.digest)]
    blobs = Counter(blob.digest for blob in sound)
    mails = Counter(_mails(maildir))
    kept = expected.published
    report.indexed = _compare(documents, expected.documents | {folder.key for folder in kept}, report)
    report.blobs = _compare(blobs, expected.blobs | {folder.digest for folder in kept}, report)
    report.bytes = sum(blob.size for blob in sound)
    report.mails = _compare(mails, {folder.digest for folder in kept}, report)
    engine = sa.create_engine(settings.sqlalchemy_url)
    with Session(engine) as session:
        rows = Counter(session.scalars(sa.select(Published.digest)))
        _compare(rows, {folder.digest for folder in kept}, report)
        states = {folder.digest: publish.state(session, publish.id_of(folder.path)) for folder in expected.folders}
    engine.dispose()
    # As they are, and not as they should be: one that is wholly withdrawn for no reason is lost, but not half done.
    for folder in expected.folders:
        there = (folder.key in documents, folder.digest in blobs, folder.digest in rows, mails[folder.digest])
        match there, states[folder.digest]:
            case (True, True, True, 1), "completed":
                report.folders_published += 1
            case (False, False, False, 0), "compensated":
                report.folders_withdrawn += 1
            case _:
                report.half_done += 1


def _compare(found: Counter[str], expected: set[str], report: Report) -> int:
    report.lost += len(expected - found.keys())
    report.ghosts += len(found.keys() - expected)
    report.duplicated += sum(count - 1 for count in found.values())
    return found.total()


def _documents(directory: Path) -> Iterable[str]:
    # No index at all is what there is before the first commit to it.
    with suppress(NotReady):
        yield from (item.key for item in IndexParticipant(directory).inventory())


def _mails(maildir: Path) -> Iterable[str]:
    """The manifest that each mail names."""
    parser = BytesHeaderParser()
    for name in ("new", "cur"):
        for file in (maildir / name).glob("*"):
            with file.open("rb") as message:
                yield str(parser.parse(message)[HEADER])
