"""Tables for a terminal: aligned columns, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """`rows` under `head` as lines of text; None is shown as a dash."""
    lines = [[*head], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    right = [bool(rows) and all(isinstance(row[n], int | float | None) for row in rows) for n in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join(map(aligned, lines))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def seconds(value: float | None) -> str:
    """A span of time for people: `0.2 s`, `3 min`, `2 h`, `5 d`."""
    if value is None:
        return "-"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{value / size:.1f} {unit}" if value < 10 else f"{value / size:.0f} {unit}"
    return f"{value / 86_400:.0f} d"
