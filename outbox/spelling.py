"""Spelling: the word of an index that an unknown word of a query probably meant.

Called by `outbox.search` when a query contains a word that the index doesn't. The words are compared with the terms
of the index itself. Xapian could keep a dictionary for this, but that costs the writer a quarter of its speed, is
not undone when a document goes, and is changed by applying the same batch again. Here only a query with an
unknown word pays: a few milliseconds, at most about 0.1 s in an index of a million words.

Found are one slip in words of 4 letters or more, and two in those of 6 or more: a letter too many, missing or
wrong, or two swapped. The first letter has to be right, unless it is swapped or one too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHORTEST = 4
"""Letters of a word that is corrected; shorter ones resemble too many others."""

TWO_SLIPS = 6
"""Letters of a word that may have two."""

BUDGET = 50_000
"""Words of the index looked at, at most."""


def suggest(db: Any, word: str) -> str | None:
    """The most similar word of the index, of several the most frequent one; or None. `word` is in lower case."""
    if len(word) < SHORTEST:
        return None
    slips = 2 if len(word) >= TWO_SLIPS else 1
    letters = set(word)
    best: tuple[int, int, str] | None = None
    for candidate, frequency in _similar(db, word, slips):
        # Each slip changes at most two letters of the set, which is fast to tell.
        if len(letters.symmetric_difference(candidate)) > 2 * slips:
            continue
        count = distance(word, candidate)
        found = (count, -frequency(), candidate)
        if count <= slips and (best is None or found < best):
            best = found
    return best[2] if best else None


def _similar(db: Any, word: str, slips: int) -> Iterator[tuple[str, Any]]:
    """Words of about the same length and beginning, each with what tells its frequency."""
    budget = BUDGET
    # As typed; the first two swapped; the second one too many; the first one too many; the second one wrong or missing.
    for start in dict.fromkeys((word[:2], word[1] + word[0], word[0] + word[2], word[1:3], word[:1])):
        for term in db.allterms(start):
            budget -= 1
            if not budget:
                return
            candidate = term.term.decode()
            if abs(len(candidate) - len(word)) <= slips and candidate != word:
                yield candidate, lambda term=term: term.termfreq


def distance(one: str, other: str) -> int:
    """Slips between two words: letters inserted, deleted, replaced, or swapped with their neighbour."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        twice, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            steps = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                steps = min(steps, twice[j - 2] + 1)
            row.append(steps)
    return row[-1]
