"""How much is claimed ahead of dramatiq's threads."""

from __future__ import annotations

import dramatiq
import pytest

from outbox.actor.delivered import Delivered, Hold
from workers.actor.channel import AHEAD, AHEAD_MOST, Channel

PREFETCH = 16


@pytest.fixture(name="clock")
def clock_fixture(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, set by the test."""
    clock = [100.0]
    monkeypatch.setattr("workers.actor.channel.time.monotonic", lambda: clock[0])
    return clock


def message(number: int) -> Delivered:
    return Delivered(dramatiq.Message("q", "a", (), {}, {}), id=number, hold=Hold("actor.q", 0, 1, None))


def test_channel_claims_what_the_threads_do_while_a_claim_is_written(clock: list[float]) -> None:
    # Given threads that finish four thousand messages in a second
    channel = Channel("q", "actor.q")
    channel.begin(PREFETCH)
    channel.put(message(number) for number in range(40))
    for _ in range(40):
        assert channel.get(0) is not None
        channel.finished()
    clock[0] += 0.01
    # Then as many are wanted as they do in that time, and what they hold
    assert channel.appetite() == PREFETCH + 4000 * AHEAD
    # And nothing more once that is there, also if it was claimed between two counts
    channel.put(message(number) for number in range(100, 100 + PREFETCH + round(4000 * AHEAD)))
    assert channel.appetite() == 0


def test_channel_claims_no_more_than_can_be_tried_with_care_however_fast_the_threads_are(clock: list[float]) -> None:
    channel = Channel("q", "actor.q")
    channel.begin(PREFETCH)
    channel.put(message(number) for number in range(1000))
    for _ in range(1000):
        assert channel.get(0) is not None
        channel.finished()
    clock[0] += 0.01
    assert channel.appetite() == PREFETCH + AHEAD_MOST


def test_channel_claims_one_when_one_hand_is_free_and_there_is_but_one(clock: list[float]) -> None:
    # Given a consumer that takes one message at a time, and is slow
    channel = Channel("q", "actor.q")
    channel.begin(1)
    channel.put([message(1), message(2)])
    assert channel.get(0) is not None
    clock[0] += 60
    assert channel.appetite() == 0
    # When it has given it back
    channel.finished()
    assert channel.get(0) is not None
    # Then another one is claimed for it
    assert channel.appetite() == 1
