"""Figures: what a benchmark measured, and the bar that it is held against.

A benchmark yields several figures. The one with a bar is what counts; the others are the absolute numbers that
it was made of, so that a reader sees what kind of machine it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from outbox.cli.table import table

MISSED = "MISSED"


class Bar(NamedTuple):
    """`<= 1.3`, `>= 0.5`: what a figure must be."""

    relation: str
    limit: float

    def met(self, value: float) -> bool:
        """Whether the value is on the right side; the limit itself counts, except for `<`."""
        match self.relation:
            case "<=":
                return value <= self.limit
            case "<":
                return value < self.limit
            case _:
                return value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


class Figure(NamedTuple):
    """One number that was measured."""

    #: The benchmark, a dot, and what of it: `orm.ratio`.
    name: str
    value: float
    #: `ratio`, `ms`, `rows/s`, …
    unit: str
    bar: Bar | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar is None else self.bar.met(self.value)

    def __str__(self) -> str:
        return f"{self.name} {shown(self.value)} {self.unit}"


def shown(value: float) -> str:
    """Three digits that mean something; whole numbers from a hundred on."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def as_table(figures: Sequence[Figure]) -> str:
    """The figures for people."""
    rows: list[tuple[Any, ...]] = []
    for figure in figures:
        benchmark, _, what = figure.name.partition(".")
        verdict = {True: "ok", False: MISSED, None: ""}[figure.ok]
        rows.append((benchmark, what, f"{shown(figure.value)} {figure.unit}", figure.bar or "", verdict))
    return table(("benchmark", "figure", "measured", "bar", "ok?"), rows)


def as_json(figures: Sequence[Figure]) -> str:
    """The figures for programs: name → value, unit, bar (text, or null) and ok (null without a bar)."""
    return json.dumps(
        {
            figure.name: {
                "value": round(figure.value, 4),
                "unit": figure.unit,
                "bar": None if figure.bar is None else str(figure.bar),
                "ok": figure.ok,
            }
            for figure in figures
        },
        indent=2,
    )
