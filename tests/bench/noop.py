"""The participant that does nothing, so that what is left is the outbox itself.

Run as a program (`python -m tests.bench.noop`) it is a worker like any other, with its settings in the environment,
that writes a line for each intent to stdout: its key, and when it arrived by CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from outbox.intent import Intent
from outbox.participant import APPLIED, Outcome, Participant
from outbox.position import Position
from outbox.settings import Settings
from workers import process

TARGET = "noop"


class Noop(Participant):
    """Counts what it is given."""

    batch_limit = 5000
    #: Never cuts a page of what is measured here.
    batch_bytes = 16_000_000

    def __init__(self, *, from_start: bool = False) -> None:
        """`from_start`: claims to be empty, so that a lane begins at the log's first intent each time."""
        self.keeps_position = from_start
        self.count = 0

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        self.count += len(batch)
        return [APPLIED] * len(batch)


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
