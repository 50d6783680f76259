"""Looks at the participants themselves, not at what the outbox believes about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from email.parser import BytesHeaderParser
from pathlib import Path

from outbox.errors import NotReady
from outbox.settings import Settings, required
from outbox.store import open_store
from workers.demo.report import Report
from workers.demo.traffic import Expected
from workers.index import IndexParticipant


def check(settings: Settings, maildir: Path, expected: Expected, report: Report) -> None:
    """Count what is there into `report`, against what committed."""
    report.committed = expected.committed
    report.rolled_back = expected.rolled_back
    report.indexed = _compare(_documents(required(settings.index, "OUTBOX_INDEX")), expected.documents, report)
    store = open_store(settings)
    held = list(store.inventory())
    # A blob whose bytes are not what its name says is as good as lost.
    sound = [blob for blob in held if store.verify(blob.digest)]
    report.blobs = _compare((blob.digest for blob in sound), expected.blobs, report)
    report.bytes = sum(blob.size for blob in sound)
    report.mails = _compare(_mails(maildir), expected.mails, report)


def _compare(found: Iterable[str], expected: set[str], report: Report) -> int:
    counts = Counter(found)
    report.lost += len(expected - counts.keys())
    report.ghosts += len(counts.keys() - expected)
    report.duplicated += sum(count - 1 for count in counts.values())
    return sum(counts.values())


def _documents(directory: Path) -> Iterable[str]:
    # No index at all is what there is before the first commit to it.
    with suppress(NotReady):
        yield from (item.key for item in IndexParticipant(directory).inventory())


def _mails(maildir: Path) -> Iterable[str]:
    parser = BytesHeaderParser()
    for name in ("new", "cur"):
        for file in (maildir / name).glob("*"):
            with file.open("rb") as message:
                yield str(parser.parse(message)["Message-ID"])
