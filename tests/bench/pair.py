"""Two ways of doing the same, measured side by side.

A machine that others use too is fast at one moment and slow at the next. So the two sides take turns, and it is
the ratios of neighbours that are compared: what slows both down cancels out. Every other pair runs the other
side first, because the second one finds caches warm and the disk's queue full. The median forgives an outlier.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple


class Pair(NamedTuple):
    """Medians over all pairs."""

    #: Ours, in whatever the sides return.
    ours: float
    #: What it is held against.
    theirs: float
    #: Median of ours / theirs of each pair, which is not the ratio of the medians.
    ratio: float


def compare(ours: Callable[[], float], theirs: Callable[[], float], *, pairs: int, warm: bool = True) -> Pair:
    """Call both sides `pairs` times in turns. `warm`: once more at first, not counted."""
    if warm:
        theirs()
        ours()
    measured: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            second = theirs()
            measured.append((ours(), second))
        else:
            first = ours()
            measured.append((first, theirs()))
    return Pair(median(a for a, _ in measured), median(b for _, b in measured), median(a / b for a, b in measured))
