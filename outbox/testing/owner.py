"""An owner of a subject's lane: tells the participant what the reader would tell it, and nothing else.

`kill` runs one in another process (`outbox.testing.victim`), which dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from outbox.intent import Intent
from outbox.participant import Outcome, Verdict
from outbox.position import Position
from outbox.testing.subject import Broken, Subject

LIMIT = 300.0
"""Seconds until a killed owner must be dead. Generous: the machine may be busy with other things."""

_BLOCKED = Outcome(Verdict.BLOCKED)


class Owner:
    """Opens the participant, and lets it go with `close`."""

    def __init__(self, subject: Subject, epoch: int, *, unclean: bool = False) -> None:
        self.participant = subject.make()
        try:
            self.participant.open(subject.view(epoch, unclean=unclean))
        except BaseException:
            # As the reader does it: what could not be opened is closed.
            self.participant.close()
            raise

    def apply(
        self,
        intents: Sequence[Intent],
        position: Position | None = None,
        *,
        receipts: Mapping[int, dict[str, Any]] | None = None,
    ) -> list[Outcome]:
        """In batches of at most `batch_limit`. A key that failed in an earlier batch is not told: it is BLOCKED."""
        limit = self.participant.batch_limit
        outcomes: list[Outcome] = []
        failed: set[str] = set()
        for start in range(0, max(1, len(intents)), limit):
            part = intents[start : start + limit]
            told = [intent for intent in part if intent.key not in failed]
            last = start + limit >= len(intents)
            if self.participant.records_attempts:
                self.participant.known({intent.id: (receipts or {}).get(intent.id, {}) for intent in told})
            passed = position if last and not failed else None
            made = list(self.participant.apply(told, passed))
            if len(made) != len(told):
                raise Broken(f"apply was given {len(told)} intents and returned {len(made)} outcomes")
            failed |= {i.key for i, outcome in zip(told, made, strict=True) if outcome.verdict is not Verdict.APPLIED}
            answers = iter(made)
            outcomes += [next(answers) if intent in told else _BLOCKED for intent in part]
        done = [i for i, outcome in zip(intents, outcomes, strict=True) if outcome.verdict is Verdict.APPLIED]
        self.participant.settle(done)
        return outcomes

    def close(self) -> None:
        self.participant.close()


def kill(subject: Subject, epoch: int, batch: Sequence[Intent], position: Position, failpoint: str = "") -> None:
    """Let another process apply `batch`, and die at the failpoint, or when `apply` has returned."""
    kind = type(subject)
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise Broken(f"{kind.__qualname__} can't be imported by another process: define it in a module, at its top")
    message = {"batch": [[i.id, i.target, i.action, i.key, i.body] for i in batch], "position": str(position)}
    environment = {
        **os.environ,
        "OUTBOX_FAILPOINT": failpoint,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    words = [kind.__module__, kind.__qualname__, str(subject.home), str(epoch)]
    done = subprocess.run(
        [sys.executable, "-m", "outbox.testing.victim", *words],
        input=json.dumps(message),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        timeout=LIMIT,
    )
    if done.returncode != -signal.SIGKILL:
        said = done.stderr.strip().splitlines()
        raise Broken(f"its process was to be killed and ended with {done.returncode} ({said[-1] if said else ''})")
    if failpoint and done.stdout:
        raise Broken(f"applying a batch does not come to the failpoint {failpoint}")
