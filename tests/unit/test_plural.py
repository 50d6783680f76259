"""Numbers of things in sentences."""

from __future__ import annotations

import pytest

from outbox.plural import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 intents are"), (1, "1 intent is"), (2, "2 intents are"), (12_345, "12,345 intents are")]
)
def test_counted_says_one_and_many(number: int, text: str) -> None:
    assert counted(number, "intent", then=(" is", " are")) == text
