"""The page of benchmarks names those that there are."""

from __future__ import annotations

from tests.bench.__main__ import BENCHMARKS
from tests.docs.pages import DOCS, code, read, rows


def test_each_benchmark_is_documented_in_the_order_in_which_it_runs() -> None:
    table = read(DOCS / "reference" / "benchmarks.md").split("\n## ")[0]
    described = [code(row[0]) for row in rows(table) if row[0].startswith("`")]
    assert described == list(BENCHMARKS)
