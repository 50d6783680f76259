"""A participant that writes down in which order it is given intents: `python -m tests.robustness.witness FILE`.

It makes an effect again when it is told again, so repetitions are allowed; what must not be is that something is seen
for the first time before what comes before it in its key.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from outbox.intent import Intent
from outbox.participant import APPLIED, Outcome, Participant
from outbox.position import Position
from outbox.settings import Settings
from workers import process


class Witness(Participant):
    """Appends a line `key operation` for each intent; durable when it returns."""

    batch_limit = 20

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        lines = "".join(f"{intent.key} {intent.payload['op']}\n" for intent in batch)
        os.write(self._file, lines.encode())  # one call: whole or not at all, for a kill
        os.fsync(self._file)
        return [APPLIED] * len(batch)

    def close(self) -> None:
        os.close(self._file)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    file = Path(sys.argv[1])
    process.run(
        Settings.load(role="worker"), "witness", lambda: Witness(file), process.Stop().install(), until_idle=False
    )
