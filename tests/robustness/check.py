"""What is at the participants, against what must be there. `compare` is pure; `look` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from outbox.blob import BlobStore
from tests.robustness.model import Expected, Operation
from workers.index import IndexParticipant


class Fault(NamedTuple):
    """A promise that was broken."""

    #: lost (I2), ghost (I1), twice (I3), order (I4), stale (I4: not the last one), total (I9), replay (I8).
    kind: str
    #: Where, and of what.
    what: str


class Row(NamedTuple):
    """An intent in the log."""

    id: int
    target: str
    action: str
    key: str
    #: The operation that wrote it, if its payload says so.
    operation: str | None


@dataclass(slots=True)
class Found:
    """What is there."""

    log: list[Row] = field(default_factory=list)
    #: key → the log id that its document says it comes from; in the order found.
    documents: list[tuple[str, int]] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    mails: list[str] = field(default_factory=list)
    #: (key, operation), in the order in which they were seen.
    notes: list[tuple[str, str]] = field(default_factory=list)
    #: The sum of the amounts that the documents say.
    total: int = 0
    #: Of an index that was filled anew from the log.
    replayed: list[tuple[str, int]] | None = None
    #: Mails after that.
    mails_replayed: list[str] | None = None


def compare(expected: Expected, found: Found) -> list[Fault]:
    """All faults; none if every promise was kept."""
    writer = {row.id: row.operation for row in found.log}
    faults = _log(expected.log, found.log)
    faults += _counted("document", expected.documents, [key for key, _ in found.documents])
    faults += [
        Fault("stale", f"document {key}: of {writer.get(number)}, and not of {expected.documents[key]}")
        for key, number in found.documents
        if key in expected.documents and writer.get(number) != expected.documents[key]
    ]
    faults += _counted("blob", expected.blobs, found.blobs)
    faults += _counted("mail", expected.mails, found.mails)
    faults += _notes(expected.notes, found.notes)
    if found.total != expected.total:
        faults.append(Fault("total", f"the documents' amounts are {found.total}, the rows' {expected.total}"))
    if found.replayed is not None and sorted(found.replayed) != sorted(found.documents):
        faults.append(Fault("replay", "an index that was filled anew has not the same documents"))
    if found.mails_replayed is not None and sorted(found.mails_replayed) != sorted(found.mails):
        faults.append(Fault("replay", "mails were sent by filling an index"))
    return faults


def _counted(what: str, expected: Iterable[str], found: Iterable[str]) -> list[Fault]:
    wanted, there = set(expected), Counter(found)
    return [
        *(Fault("lost", f"{what} {name}") for name in sorted(wanted - there.keys())),
        *(Fault("ghost", f"{what} {name}") for name in sorted(there.keys() - wanted)),
        *(Fault("twice", f"{what} {name}") for name, count in sorted(there.items()) if count > 1),
    ]


def _log(expected: Mapping[tuple[str, str], list[tuple[str, str]]], rows: Iterable[Row]) -> list[Fault]:
    """Each key's history in the log is its history in the application's rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows):
        found.setdefault((row.target, row.key), []).append(row)
    faults = []
    for where in sorted(expected.keys() | found.keys()):
        wanted, there = expected.get(where, []), found.get(where, [])
        name = "log of {} {}".format(*where)
        if len(there) != len(wanted):
            faults.append(
                Fault("lost" if len(there) < len(wanted) else "ghost", f"{name}: {len(there)} of {len(wanted)}")
            )
        elif any(
            row.action != action or row.operation not in (None, operation)
            for row, (action, operation) in zip(there, wanted, strict=True)
        ):
            faults.append(Fault("order", name))
    return faults


def _notes(expected: Mapping[str, list[str]], found: Iterable[tuple[str, str]]) -> list[Fault]:
    """Repetitions are allowed; what is seen for the first time is seen in order."""
    seen: dict[str, dict[str, None]] = {}
    for key, operation in found:
        seen.setdefault(key, {})[operation] = None
    faults = []
    for key in sorted(expected.keys() | seen.keys()):
        wanted, there = expected.get(key, []), list(seen.get(key, {}))
        faults += _counted(f"note of {key}", wanted, there)
        if sorted(wanted) == sorted(there) and wanted != there:
            faults.append(Fault("order", f"notes of {key}"))
    return faults


# ----------------------------------------------------------------------------------------------- looking


def operations(conn: psycopg.Connection[Any]) -> list[Operation]:
    """What the applications committed."""
    rows = conn.execute("select id, kind, key, version, amount, ref from operation")
    return [Operation(*row) for row in rows]


def skipped(conn: psycopg.Connection[Any]) -> set[str]:
    """The operations that operators took out, as the audit trail says."""
    rows = conn.execute(
        "select coalesce(l.payload ->> 'op', l.payload -> 'data' ->> 'op') from outbox.audit a "
        "join outbox.log l on l.id = a.intent where a.action = 'skip'"
    )
    return {row[0] for row in rows}


def look(conn: psycopg.Connection[Any], state: Path, witness: Path) -> Found:
    """Read the participants themselves, and the log."""
    log = conn.execute(
        "select id, target, action, key, coalesce(payload ->> 'op', payload -> 'data' ->> 'op') from outbox.log"
    )
    found = Found([Row(*row) for row in log])
    found.documents = documents(state / "index")
    store = BlobStore(state / "blobs")
    # A blob whose bytes are not what its name says is as good as lost.
    found.blobs = [blob.digest for blob in store.inventory() if store.verify(blob.digest)]
    found.mails = mails(state / "mail")
    for line in witness.read_text(encoding="utf-8").splitlines() if witness.exists() else []:
        key, _, operation = line.partition(" ")
        found.notes.append((key, operation))
    return found


def documents(directory: Path) -> list[tuple[str, int]]:
    """key and log id of each document of an index."""
    return [(item.key, item.id) for item in IndexParticipant(directory).inventory()]


def mails(maildir: Path) -> list[str]:
    """The Message-ID of each mail."""
    parser = BytesHeaderParser()
    found = []
    for folder in ("new", "cur"):
        for file in (maildir / folder).glob("*"):
            with file.open("rb") as message:
                found.append(str(parser.parse(message)["Message-ID"]))
    return found
