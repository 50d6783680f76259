"""The benchmark program: its names, its usage, its output. Never its speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import BENCHMARKS, main
from tests.bench.figure import MISSED, Bar, Figure, as_json, as_table

ROOT = Path(__file__).resolve().parents[2]


def test_all_names_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in BENCHMARKS)


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["orm", "warp"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "there is no benchmark warp" in said
    assert all(name in said for name in BENCHMARKS)


@pytest.mark.parametrize(
    ("relation", "below", "at", "above"),
    [("<=", True, True, False), ("<", True, False, False), (">=", False, True, True)],
)
def test_the_limit_counts_as_the_relation_says(relation: str, below: bool, at: bool, above: bool) -> None:
    bar = Bar(relation, 1.3)
    assert [bar.met(value) for value in (1.2, 1.3, 1.4)] == [below, at, above]


def test_a_missed_bar_is_said_in_both_forms() -> None:
    figures = [Figure("x.ratio", 0.4, "ratio", Bar(">=", 0.5)), Figure("x.ours", 1234.5, "rows/s")]
    assert MISSED in as_table(figures)
    assert json.loads(as_json(figures)) == {
        "x.ratio": {"value": 0.4, "unit": "ratio", "bar": ">= 0.5", "ok": False},
        "x.ours": {"value": 1234.5, "unit": "rows/s", "bar": None, "ok": None},
    }


def test_a_quick_run_prints_its_figures_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--json", "orm"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    # 1: a bar was missed, which on a machine that runs tests says nothing.
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {"orm.ratio", "orm.with", "orm.without"}
    assert all(set(figure) == {"value", "unit", "bar", "ok"} and figure["value"] > 0 for figure in figures.values())
    assert figures["orm.ratio"]["bar"] == "<= 1.3"
    assert done.returncode == (0 if figures["orm.ratio"]["ok"] else 1)
    assert ("bar missed" in done.stderr) is (done.returncode == 1)
    assert "Postgres" in done.stderr
