"""Tables for a terminal: aligned columns, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """`rows` under `head` as lines of text; None is shown as a dash."""
    texts = [["-" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(head[n]), *(len(row[n]) for row in texts), 0) if texts else len(head[n]) for n in range(len(head))]
    right = [bool(rows) and all(isinstance(row[n], int | float | None) for row in rows) for n in range(len(head))]
    lines = [[*head], *texts]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def seconds(value: float | None) -> str:
    """A span of time for people: `0.2 s`, `3 min`, `2 h`, `5 d`."""
    if value is None:
        return "-"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{value / size:.1f} {unit}" if value < 10 else f"{value / size:.0f} {unit}"  # noqa: PLR2004
    return f"{value / 86_400:.0f} d"
