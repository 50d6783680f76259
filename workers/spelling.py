"""The spelling dictionary: which words a misspelt query can be corrected to.

Called by `workers.index`, one for each shard. Xapian can note every word itself while it indexes a text, which
takes a quarter of the speed. Here a word is written when it is new, and then each time its count has grown
fourfold, which is as good for choosing between two corrections; and while there is much to do, the words of
several batches are written together, because new words that resemble each other share blocks. Numbers, and
what has no spaces between its words, are left out.

Counts start anew with each process, and a word stays when its last document is deleted: they only rank
suggestions, and `outbox.search` never suggests what finds nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

KEPT = 300_000
"""Words remembered, some 30 MB. Beyond that counting starts anew."""

BUSY = 500
"""A batch of so many documents is likely to be followed by another one, and its words can wait for that."""

WAIT = 10
"""For so many batches at most. A crash meanwhile loses suggestions, no documents."""

_WORD = re.compile(r"[^\W\d_]{3,32}")
# Above are the scripts that are written without spaces.
_LAST = "\u2e80"


class Dictionary:
    """What was noted of words, and what is still to be. Lives as long as the handle of the database."""

    def __init__(self) -> None:
        # Both by what stands between spaces: cutting words out of it exactly is only done for what is noted.
        self._counts: dict[str, int] = {}
        self._batch: Counter[str] = Counter()
        self._waited = 0

    def read(self, text: str) -> None:
        """Count the words of a text."""
        self._batch.update(text.lower().split())

    def write(self, db: Any, documents: int) -> None:
        """Inside the transaction of a batch of so many documents, note the words read since the last time.

        If the transaction fails, start with a new Dictionary.
        """
        self._waited += 1
        if self._counts and documents >= BUSY and self._waited < WAIT:
            return
        self._waited = 0
        counts = self._counts
        for chunk, count in self._batch.items():
            before = counts.get(chunk, 0)
            counts[chunk] = before + count
            level, noted = _level(before + count), _level(before)
            if level > noted:
                more = 4**level - (4**noted if before else 0)
                for word in _WORD.findall(chunk):
                    if max(word) < _LAST:
                        db.add_spelling(word, more)
        self._batch.clear()
        if len(counts) > KEPT:
            counts.clear()


def _level(count: int) -> int:
    """-1 for none, 0 for 1 to 3, 1 for 4 to 15, 2 for 16 to 63, …"""
    return (count.bit_length() + 1) // 2 - 1
