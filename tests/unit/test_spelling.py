"""How far words are apart. What is suggested from a real index is in tests/integration/test_search.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.spelling import distance


@pytest.mark.parametrize(
    ("one", "other", "slips"),
    [
        ("report", "report", 0),
        ("report", "rport", 1),
        ("report", "repport", 1),
        ("report", "repord", 1),
        ("librarian", "librarain", 1),
        ("librarian", "librrain", 2),
        ("", "abc", 3),
        ("abc", "", 3),
    ],
)
def test_distance_counts_slips(one: str, other: str, slips: int) -> None:
    assert distance(one, other) == slips


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_distance_is_symmetric_and_bounded(one: str, other: str) -> None:
    assert distance(one, other) == distance(other, one)
    assert abs(len(one) - len(other)) <= distance(one, other) <= max(len(one), len(other))
    assert (distance(one, other) == 0) == (one == other)
