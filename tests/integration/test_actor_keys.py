"""Keys of actors: order, one at a time, and so many at a time."""

from __future__ import annotations

import dramatiq
import pytest

from outbox.errors import IntentRefused
from tests.fixtures.actors import Stage
from tests.fixtures.site import until


def test_actor_i4_messages_of_a_key_run_in_order_and_one_at_a_time(stage: Stage) -> None:
    company, ran = stage.company, []

    @dramatiq.actor(broker=company.broker, ordering_key=lambda key, _n: key)
    def step(key: str, n: int) -> None:
        ran.append((key, n))

    for n in range(10):
        for key in "abc":
            step.send(key, n)
    stage.work()
    stage.drained()
    for key in "abc":
        assert [n for k, n in ran if k == key] == list(range(10))
