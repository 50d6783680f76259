"""Named gaps between two durable writes, at which a test can kill the process.

`hit(name)` stands in the code at each gap and does nothing unless the environment variable
`OUTBOX_FAILPOINT` names it: `OUTBOX_FAILPOINT=index.committed` kills the process there with SIGKILL,
`…=index.committed:3` at the third time. Tests only; there is no other action.

A participant of a user's own hits failpoints of its own: their names begin with `own.`, and stand nowhere else.
"""

from __future__ import annotations

import os
import signal

#: Every failpoint, in the order of an intent's life. A name that isn't here can't be hit.
NAMES = (
    # The application, inside its transaction.
    "blob.written",
    "blob.staged",
    "session.appended",
    # The clock, and any owner of a lane.
    "lane.claimed",
    "lane.renewed",
    "tick.taken",
    # A worker opens its participant, and finds out what its predecessor left in doubt.
    "index.opened",
    "index.epoch",
    "blob.opened",
    "receipt.resolved",
    # A batch.
    "reader.aside",
    "lane.suspected",
    "receipt.opened",
    "receipt.returned",
    "index.documents",
    "index.committed",
    "blob.shelved",
    "blob.put",
    "blob.replaced",
    "blob.deleted",
    "blob.linked",
    "blob.synced",
    "blob.published",
    "maildir.written",
    "maildir.renamed",
    "maildir.stored",
    "mail.submitted",
    "receipt.stored",
    "receipt.prepared",
    "mail.released",
    "reader.applied",
    "lane.advanced",
    "reader.parked",
    "reader.recorded",
    "blob.settled",
    "reader.settled",
    # What is parked.
    "parked.taken",
    "parked.returned",
    "parked.applied",
    "parked.recorded",
    "parked.promoted",
    # The end of an owner, and housekeeping.
    "lane.shown",
    "lane.released",
    "house.partitions",
    "house.ticks",
    "house.positions",
    "sweep.removed",
    "sweep.purged",
)

_name, _, _count = os.environ.get("OUTBOX_FAILPOINT", "").partition(":")
if _name and _name not in NAMES and not _name.startswith("own."):
    raise SystemExit(f"OUTBOX_FAILPOINT={_name} is not a failpoint; known: {', '.join(NAMES)}")
_left = int(_count or 1)


def hit(name: str) -> None:
    """Die here if the test asked for it."""
    global _left  # noqa: PLW0603 - one counter per process is the point
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
