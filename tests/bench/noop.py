"""The participant that does nothing, so that what is left is the outbox itself.

Run as a program (`python -m tests.bench.noop`) it is a worker like any other, with its settings in the environment,
that writes a line for each intent to stdout: its key, and when it arrived by CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outbox.intent import Intent
from outbox.participant import APPLIED, Doubt, Evidence, Item, LaneView, Outcome
from outbox.position import Position
from outbox.settings import Settings
from workers import process

TARGET = "noop"


class Noop:
    """Counts what it is given."""

    batch_limit = 5000
    #: Never cuts a page of what is measured here.
    batch_bytes = 16_000_000
    records_attempts = False

    def __init__(self, *, from_start: bool = False) -> None:
        """`from_start`: claims to be empty, so that a lane begins at the log's first intent each time."""
        self.keeps_position = from_start
        self.count = 0

    def open(self, lane: LaneView) -> None:
        pass

    def position(self) -> Position | None:
        return None

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        self.count += len(batch)
        return [APPLIED] * len(batch)

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        pass

    def settle(self, batch: Sequence[Intent]) -> None:
        pass

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        return [(Evidence.UNKNOWN, None) for _ in doubts]

    def inventory(self) -> Iterator[Item]:
        return iter(())

    def close(self) -> None:
        pass


class Stopwatch(Noop):
    """Says when each intent arrived."""

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        now = time.monotonic()
        for intent in batch:
            print(intent.key, now)
        return super().apply(batch, position)


def main() -> None:
    """Drain until SIGTERM."""
    process.run(Settings.load(role="worker"), TARGET, Stopwatch, process.Stop().install(), until_idle=False)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
