"""A position: how far a lane is, in a form that a participant can keep for itself.

A position names a stored tick of one log and the tick's nonce. Inside a batch (the intents between
two ticks) it also names the batch's other end and the last intent done, so that a batch of a million
rows can be resumed in its middle.

Printed, a position is one word, such as `3f0c9a52e1b84d07/512.9c41d2e07ab35f18` or, in the middle of
a batch, `3f0c9a52e1b84d07/512.9c41d2e07ab35f18+515@90210`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TEXT = re.compile(r"([0-9a-f]{16})/(\d+)\.([0-9a-f]{16})(?:\+(\d+)@(\d+))?")


class Position(NamedTuple):
    """All intents up to tick `tick` are done; and, if `upto` is set, those of the batch
    `tick` → `upto` whose id is at most `after`."""

    #: The log's identity, drawn when the schema was made (16 hex digits).
    log: str
    #: The tick that is done completely.
    tick: int
    #: That tick's random nonce: another history has another one (16 hex digits).
    nonce: str
    #: The tick that the batch in progress ends at; 0 between batches.
    upto: int = 0
    #: The last intent done of the batch in progress; 0 between batches.
    after: int = 0

    def __str__(self) -> str:
        tail = f"+{self.upto}@{self.after}" if self.upto else ""
        return f"{self.log}/{self.tick}.{self.nonce}{tail}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position that `str()` printed. Raises ValueError for any other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a position: expected LOG/TICK.NONCE[+UPTO@AFTER]")
        log, tick, nonce, upto, after = match.groups()
        return cls(log, int(tick), nonce, int(upto or 0), int(after or 0))


class Token(NamedTuple):
    """What a commit yields: the transaction, and the last intent that it wrote.

    `outbox.wait(session, token, "index")` blocks until that participant has it; `outbox.committed(session, token)`
    answers whether the transaction did commit when the reply to COMMIT was lost.
    """

    xid: int
    id: int
