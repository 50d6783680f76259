"""Turns of actors' messages: what options say, and what an intent makes of it."""

from __future__ import annotations

from typing import Any

import dramatiq
import pytest

from outbox.actor import OutboxBroker
from outbox.actor.letter import intent_of, message_of
from outbox.actor.turn import Turn, turn_in, turn_of
from outbox.errors import IntentRefused
from workers.actor.line import Line


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ordering_key": 7}, "function of the message's arguments"),
        ({"concurrency": 0}, "number from 1"),
        ({"concurrency": True}, "number from 1"),
        ({"concurrency_key": "x"}, "say how many"),
        ({"ordering_key": "x", "concurrency": 2}, "leave one out"),
        ({"ordering_key": "x", "pass_dead_letters": 1}, "neither True nor False"),
    ],
)
def test_actor_options_are_refused_when_the_actor_is_declared(options: dict[str, Any], error: str) -> None:
    broker = OutboxBroker()
    with pytest.raises(IntentRefused, match=error):
        dramatiq.actor(broker=broker, actor_name="x", **options)(lambda: None)
    assert broker.actors == {}


@pytest.mark.parametrize(
    ("declared", "sent", "action", "key"),
    [
        ({}, {}, "send", None),
        ({"ordering_key": "k"}, {}, "send.ordered", "k"),
        ({"ordering_key": lambda number: f"order {number}"}, {}, "send.ordered", "order 7"),
        ({"ordering_key": lambda _number: None}, {}, "send", None),
        ({"ordering_key": "k"}, {"ordering_key": "own"}, "send.ordered", "own"),
        ({"ordering_key": "k", "pass_dead_letters": True}, {}, "send.ordered.passed", "k"),
        ({"ordering_key": "k", "pass_dead_letters": True}, {"ordering_key": "own"}, "send.ordered.passed", "own"),
        ({"ordering_key": "k", "pass_dead_letters": True}, {"pass_dead_letters": False}, "send.ordered", "k"),
        ({"concurrency": 3}, {}, "send.limited.3", "limit x"),
        ({"concurrency": 3}, {"ordering_key": "own"}, "send.ordered", "own"),
        ({"concurrency": 3, "concurrency_key": str}, {}, "send.limited.3", "limit 7"),
        ({"ordering_key": "k"}, {"concurrency_key": "h", "concurrency": 2}, "send.limited.2", "limit h"),
    ],
)
def test_actor_message_has_the_turn_that_its_options_say(
    declared: dict[str, Any], sent: dict[str, Any], action: str, key: str | None
) -> None:
    broker = OutboxBroker()
    actor = dramatiq.actor(broker=broker, actor_name="x", **declared)(lambda number: None)
    message = actor.message_with_options(args=(7,), **sent)
    intent = intent_of(message, turn=turn_of(message, actor))
    assert (intent.action, intent.key) == (action, key or message.message_id)
    # And what the intent says is read as it was meant
    assert turn_in(intent) == turn_of(message, actor)
    assert message_of(intent).args == (7,)


@pytest.mark.parametrize("key", ["", 7, "x" * 600])
def test_actor_message_is_refused_when_its_key_is_none(key: object) -> None:
    actor = dramatiq.actor(broker=OutboxBroker(), actor_name="x")(lambda: None)
    message = actor.message_with_options(ordering_key=key)
    with pytest.raises(IntentRefused):
        intent_of(message, turn=turn_of(message, actor))


def test_actor_line_i4_next_of_a_key_is_not_admitted_before_it_is_written_that_the_first_is_done() -> None:
    # Given a message in hand, and one of another key that had to wait
    line, ordered, limited = Line(), Turn("a", 0), Turn("b", 1)
    assert line.admit(ordered, 1)
    assert line.admit(limited, 2)
    assert not line.admit(limited, 3)
    # When they are given back, the next ones have to wait all the same
    line.done(ordered, 1)
    line.done(limited, 2)
    assert not line.admit(ordered, 4)
    # And may have their turn with the write that says so
    assert line.next() == {"a": 0, "b": 0}
    # Then, not before, the way is free
    line.wrote()
    assert line.admit(ordered, 5)
    assert line.counts == {"a": 1}
    assert line.next() == {}
