"""`python -m outbox.testing.victim MODULE CLASS HOME EPOCH`: an owner that is there to be killed.

Run by `outbox.testing.owner.kill`. It applies the batch that it reads from stdin, and kills itself at the failpoint
that OUTBOX_FAILPOINT names, or else when `apply` has returned; then it has printed a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from outbox.intent import Intent
from outbox.position import Position
from outbox.testing.owner import Owner
from outbox.testing.subject import Subject


def main(module: str, name: str, home: str, epoch: str) -> None:
    message = json.loads(sys.stdin.read())
    subject: Subject = getattr(import_module(module), name)(Path(home))
    participant = Owner(subject, int(epoch), unclean=True).participant
    batch = [Intent(*values) for values in message["batch"]]
    position = Position.parse(message["position"])
    for start in range(0, len(batch), participant.batch_limit):
        part = batch[start : start + participant.batch_limit]
        if participant.records_attempts:
            participant.known({intent.id: {} for intent in part})
        participant.apply(part, position if part[-1] is batch[-1] else None)
    print("applied", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
