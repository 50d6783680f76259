"""The result of a demonstration."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from outbox.cli.table import table


@dataclass(slots=True)
class Report:
    """What was done, and what was found at the participants."""

    #: Transactions, of a file or of a folder.
    committed: int = 0
    rolled_back: int = 0
    #: Documents in the index.
    indexed: int = 0
    #: Blobs in the store, re-hashed; files with the same content share one.
    blobs: int = 0
    bytes: int = 0
    #: Messages in the Maildir.
    mails: int = 0
    #: Folders whose saga has completed: row, document, manifest and one mail are there.
    folders_published: int = 0
    #: Folders whose saga was compensated: none of the four is there.
    folders_withdrawn: int = 0
    #: Committed, and not at its participant.
    lost: int = 0
    #: At its participant more than once.
    duplicated: int = 0
    #: At a participant, and not committed.
    ghosts: int = 0
    #: Folders that are neither published nor withdrawn.
    half_done: int = 0
    kills: int = 0
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return not (self.lost or self.duplicated or self.ghosts or self.half_done)

    def json(self) -> dict[str, int | float]:
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def text(self) -> str:
        rows = [(name.replace("_", " "), f"{value:,}") for name, value in self.json().items()]
        width = max(len(value) for _, value in rows)
        verdict = (
            "Nothing lost, nothing twice, no ghosts, nothing half done." if self.kept else "THE PROMISE WAS NOT KEPT."
        )
        return table(("", ""), [(name, value.rjust(width)) for name, value in rows]).lstrip("\n") + f"\n\n{verdict}"
