"""What must be at the participants, as a function of what the application committed and operators skipped. Pure.

The truth is in the application's own table: an operation is a row that was written in the same transaction, and the
same savepoint, as its intent. The version of its key was drawn under the lock of the key's row.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Literal, NamedTuple

Kind = Literal[
    "index.put", "index.delete", "index.poison", "index.due", "blob.put", "blob.delete", "mail.send", "witness.note"
]


class Operation(NamedTuple):
    """One thing that an application did, and committed."""

    id: str
    kind: Kind
    #: The key of the intent: of a document, a digest, of a mail.
    key: str
    #: Rises by one with each operation of a row.
    version: int
    #: For totals.
    amount: int = 0
    #: For mail: the Message-ID.
    ref: str = ""

    @property
    def target(self) -> str:
        return self.kind.split(".")[0]

    @property
    def action(self) -> str:
        action = self.kind.split(".")[1]
        return "put" if action in ("poison", "due") else action


@dataclass(slots=True)
class Expected:
    """What must be there."""

    #: key → the operation that its document must come from.
    documents: dict[str, str] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)
    #: Message-IDs.
    mails: set[str] = field(default_factory=set)
    #: key → its operations in the order in which they must be seen for the first time.
    notes: dict[str, list[str]] = field(default_factory=dict)
    #: (target, key) → actions and operations, in the order in which they must be in the log.
    log: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    #: The sum of the amounts of all documents.
    total: int = 0


def expected(operations: Iterable[Operation], skipped: AbstractSet[str]) -> Expected:
    """`skipped` are the ids of operations that an operator took out."""
    result = Expected()
    ordered = sorted(operations, key=lambda each: (each.target, each.key, each.version))
    for (target, key), group in groupby(ordered, key=attrgetter("target", "key")):
        history = list(group)
        result.log[target, key] = [(each.action, each.id) for each in history]
        effective = [each for each in history if each.id not in skipped and each.kind != "index.poison"]
        if not effective:
            continue
        last = effective[-1]
        match target:
            case "index" if last.action == "put":
                result.documents[key] = last.id
                result.total += last.amount
            case "blob" if last.action == "put":
                result.blobs.add(key)
            case "mail":
                result.mails |= {each.ref for each in effective}
            case "witness":
                result.notes[key] = [each.id for each in effective]
    return result
