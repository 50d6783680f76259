"""Turns of actors' messages: what options say, and what an intent makes of it."""

from __future__ import annotations

from typing import Any

import dramatiq
import pytest

from outbox.actor import OutboxBroker
from outbox.actor.letter import intent_of, message_of
from outbox.actor.turn import turn_in, turn_of
from outbox.errors import IntentRefused


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ordering_key": 7}, "function of the message's arguments"),
        ({"concurrency": 0}, "number from 1"),
        ({"concurrency": True}, "number from 1"),
        ({"concurrency_key": "x"}, "say how many"),
        ({"ordering_key": "x", "concurrency": 2}, "leave one out"),
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
        ({"concurrency": 3}, {}, "send.limited.3", "limit x"),
        ({"concurrency": 3}, {"ordering_key": "own"}, "send.ordered", "own"),
        ({"concurrency": 3, "concurrency_key": str}, {}, "send.limited.3", "limit 7"),
        ({"ordering_key": "k"}, {"concurrency_key": "h", "concurrency": 2}, "send.limited.2", "limit h"),
    ],
)
def test_actor_message_has_the_turn_that_its_options_say(
    declared: dict[str, Any], sent: dict[str, object], action: str, key: str | None
) -> None:
    broker = OutboxBroker()
    actor = dramatiq.actor(broker=broker, actor_name="x", **declared)(lambda number: None)
    message = actor.message_with_options(args=(7,), **sent)
    intent = intent_of(message, turn=turn_of(message, actor))
    assert (intent.action, intent.key) == (action, key or message.message_id)
    # And what the intent says is read as it was meant
    assert turn_in(intent) == turn_of(message, actor)
    assert message_of(intent).args == (7,)
