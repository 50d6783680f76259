"""Tables for a terminal (aligned columns, numbers to the right), and what they and JSON need of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
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
    return f"{value:,}" if isinstance(value, int) else clean(str(value))


def clean(text: str) -> str:
    """`text` without what could steer the terminal: keys come from applications, errors from participants."""
    return "".join(c if c.isprintable() else " " for c in text)


def jsonable(value: object) -> str:
    """What JSON has no type for: times, in ISO 8601."""
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(type(value).__name__)
