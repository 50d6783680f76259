"""Named gaps between two durable writes, at which a test can kill the process.

`hit(name)` stands in the code at each gap and does nothing unless the environment variable
`OUTBOX_FAILPOINT` names it: `OUTBOX_FAILPOINT=index.committed` kills the process there with SIGKILL,
`…=index.committed:3` at the third time. Tests only; there is no other action.
"""

from __future__ import annotations

import os
import signal

#: Every failpoint, in the order of an intent's life. A name that isn't here can't be hit.
NAMES = (
    "blob.staged",
    "session.appended",
    "tick.taken",
    "receipt.opened",
    "index.documents",
    "index.committed",
    "blob.linked",
    "blob.published",
    "mail.submitted",
    "reader.applied",
    "lane.advanced",
    "reader.settled",
    "saga.written",
    "saga.committed",
)

_name, _, _count = os.environ.get("OUTBOX_FAILPOINT", "").partition(":")
if _name and _name not in NAMES:
    raise SystemExit(f"OUTBOX_FAILPOINT={_name} is not a failpoint; known: {', '.join(NAMES)}")
_left = int(_count or 1)


def hit(name: str) -> None:
    """Die here if the test asked for it."""
    global _left  # noqa: PLW0603 - one counter per process is the point
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
