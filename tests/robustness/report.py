"""The result of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from outbox.cli.table import table
from tests.robustness.check import Fault

SHOWN = 20
"""Faults in the text; all are in the JSON."""


@dataclass(slots=True)
class Report:
    """What was done, what was injected, and which promises were broken."""

    seed: str
    seconds: float = 0.0
    #: From the last fault to the last effect (I10).
    drain_seconds: float = 0.0
    #: What committed, by kind of operation.
    operations: Counter[str] = field(default_factory=Counter)
    transactions: int = 0
    #: Each fault that was to be injected, and how often it was.
    injected: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        """What was planned and never happened (I11): a run without it proves nothing about it."""
        return sorted(name for name, count in self.injected.items() if not count)

    @property
    def kept(self) -> bool:
        """Whether all promises were kept, in the face of all faults that were planned."""
        return not self.faults and not self.missed

    def json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "drain_seconds": round(self.drain_seconds, 1),
            "transactions": self.transactions,
            "operations": dict(sorted(self.operations.items())),
            "injected": dict(sorted(self.injected.items())),
            "missed": self.missed,
            "faults": [fault._asdict() for fault in self.faults],
        }

    def text(self) -> str:
        drained = f"drained in {self.drain_seconds:.1f} s after the last fault"
        parts = [
            f"seed {self.seed}: {self.transactions:,} transactions in {self.seconds:.0f} s; {drained}",
            table(("committed", "times"), sorted(self.operations.items())),
            table(("injected", "times"), sorted(self.injected.items())),
        ]
        if self.missed:
            parts.append(f"NEVER INJECTED: {', '.join(self.missed)}")
        if self.faults:
            parts.append(table(("fault", ""), self.faults[:SHOWN]))
            parts.append(f"{len(self.faults):,} PROMISES WERE BROKEN.")
        else:
            parts.append("Nothing lost, nothing twice, no ghosts, all in order.")
        return "\n\n".join(parts)
