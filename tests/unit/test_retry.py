"""When to try again."""

from __future__ import annotations

import random

from outbox.retry import Backoff


def test_backoff_doubles_up_to_its_limit_with_full_jitter() -> None:
    backoff = Backoff(first=1.0, limit=60.0, _random=random.Random(1))
    for attempt, ceiling in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (500, 60)):
        waits = [backoff.wait(attempt) for _ in range(200)]
        assert max(waits) <= ceiling
        assert min(waits) >= ceiling / 10
        assert max(waits) - min(waits) > ceiling / 2


def test_backoff_never_comes_earlier_than_it_was_asked_to() -> None:
    assert Backoff(first=1.0).wait(1, asked=30.0) == 30.0
    assert Backoff(first=100.0).wait(1, asked=0.0) >= 10.0
