"""A finding: one thing in which a participant differs from what base and log say that it holds."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["missing", "stale", "orphaned", "corrupt", "duplicate", "open"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""missing: live, and not held. stale: what is held is of an older intent. orphaned: held, and not live. corrupt: what
is held is what no intent says. duplicate: an effect that was made twice. open: an attempt whose outcome nobody knows.
"""

Repair = Literal["put", "delete", ""]
"""Which intent repairs it; none, if no intent can."""


class Finding(NamedTuple):
    """One difference, seen twice."""

    kind: Kind
    #: The key; or, with no key to tell, the place in the participant's own words.
    key: str
    #: The intent that should be held; of an orphan, the one that is. 0: not known.
    id: int
    #: What is wrong, in one sentence without payloads and addresses.
    why: str
    repair: Repair = ""
    #: Where nothing repairs it: what to do.
    advice: str = ""

    @classmethod
    def read(cls, stored: list[Any]) -> Finding:
        """From `outbox.operation`, where findings are arrays."""
        return cls(*stored)
