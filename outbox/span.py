"""Spans of time, as people read and write them."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(s|min|m|h|d)")


def seconds(value: float | None) -> str:
    """Seconds for people: `0.2 s`, `3 min`, `2 h`, `5 d`; None is a dash."""
    if value is None:
        return "-"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{value / size:.1f} {unit}" if value < 10 else f"{value / size:.0f} {unit}"
    return f"{value / 86_400:.0f} d"


def parse(text: str) -> float:
    """`30s`, `5min`, `2h`, `7d` in seconds. Raises `ValueError` for anything else."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a span of time: write it like 30s, 5min, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]
