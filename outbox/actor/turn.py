"""The turn: messages of one key of a queue that run one at a time in order, or so many at a time.

    @dramatiq.actor(ordering_key=lambda order, **_: f"order {order}")
    @dramatiq.actor(concurrency_key=lambda host, **_: host, concurrency=3)
    @dramatiq.actor(concurrency=10)     # of this actor, whatever it is about

    ship.send_with_options(args=(7,), ordering_key="order 7")

An actor's key is text, or a function of the message's arguments that returns text, or None for a message that has no
key. A message's own options come first. Read by `outbox.actor.broker`; what an intent says of it is read by
`workers.actor`. No I/O. Raises `IntentRefused` for options that can't be kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import dramatiq

from outbox.errors import IntentRefused
from outbox.intent import Intent

OPTIONS = frozenset({"ordering_key", "pass_dead_letters", "concurrency_key", "concurrency"})
"""What an actor, or a message, can say of its turn."""

LIMIT_MOST = 9999
"""The most messages of a key that run at a time. Beyond that, it is no limit."""

_WAITS = "send."
_ORDERED = "send.ordered"
_PASSED = "send.ordered.passed"
_LIMITED = re.compile(r"send\.limited\.([1-9][0-9]{0,3})")


class Turn(NamedTuple):
    """A message that waits for its turn among those of its key."""

    key: str
    #: How many of the key may run at a time; 0: one, in the order of the log.
    limit: int
    #: In order: whether those behind go on when it is given up.
    passed: bool = False

    @property
    def action(self) -> str:
        """How an intent says it (also in 0013_keys.sql: outbox.turns)."""
        if self.limit:
            return f"send.limited.{self.limit}"
        return _PASSED if self.passed else _ORDERED


def turn_in(intent: Intent) -> Turn | None:
    """The turn that an intent waits for; None: its key means nothing."""
    if not intent.action.startswith(_WAITS):
        return None  # as nearly all do
    if intent.action in (_ORDERED, _PASSED):
        return Turn(intent.key, 0, intent.action == _PASSED)
    found = _LIMITED.fullmatch(intent.action)
    return Turn(intent.key, int(found[1])) if found else None


def check(actor: dramatiq.Actor[Any, Any]) -> None:
    """Refuse an actor whose options can't be kept."""
    options = actor.options
    for name in ("ordering_key", "concurrency_key"):
        value = options.get(name)
        if not (value is None or callable(value) or (isinstance(value, str) and value)):
            raise IntentRefused(
                f"{name} of the actor {actor.actor_name} is a {type(value).__name__}: "
                "give text, or a function of the message's arguments that returns text"
            )
    _limit(options, actor.actor_name)
    _consistent(options, actor.actor_name)


def turn_of(message: dramatiq.Message[Any], actor: dramatiq.Actor[Any, Any] | None) -> Turn | None:
    """The turn of a message that is about to be sent; None: it runs as soon as there is a hand."""
    own = {name: value for name, value in message.options.items() if name in OPTIONS}
    said = {} if actor is None else {name: value for name, value in actor.options.items() if name in OPTIONS}
    if not own and not said:
        return None
    if own.get("ordering_key") is not None:
        said = {option: value for option, value in said.items() if option == "pass_dead_letters"}
    elif own.get("concurrency_key") is not None:
        said.pop("ordering_key", None)
    options = {**said, **own}
    name = message.actor_name
    limit = _limit(options, name)
    _consistent(options, name)
    if (key := _key("ordering_key", options, message)) is not None:
        return Turn(key, 0, options.get("pass_dead_letters") is True)
    if limit is None:
        return None
    if options.get("concurrency_key") is None:
        return Turn(f"limit {name}", limit)
    key = _key("concurrency_key", options, message)
    # Two actors that mean different things by one text don't wait for each other's orders.
    return None if key is None else Turn(f"limit {key}", limit)


def _consistent(options: Mapping[str, Any], name: str) -> None:
    given = {option for option in OPTIONS if options.get(option) is not None}
    if "pass_dead_letters" in given and not isinstance(options["pass_dead_letters"], bool):
        raise IntentRefused(f"pass_dead_letters of {name} is neither True nor False: give one of them")
    if "ordering_key" in given and given & {"concurrency", "concurrency_key"}:
        raise IntentRefused(
            f"{name} has an ordering key and a concurrency: in order, they run one at a time already; leave one out"
        )
    if "concurrency_key" in given and "concurrency" not in given:
        raise IntentRefused(f"{name} has a concurrency_key without a concurrency: say how many may run at a time")


def _limit(options: Mapping[str, Any], name: str) -> int | None:
    value = options.get("concurrency")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMIT_MOST:
        raise IntentRefused(f"the concurrency of {name} is not a number from 1 to {LIMIT_MOST}: give one")
    return value


def _key(option: str, options: Mapping[str, Any], message: dramatiq.Message[Any]) -> str | None:
    value = options.get(option)
    if callable(value):
        value = value(*message.args, **message.kwargs)
    if value is None or (isinstance(value, str) and value):
        return value
    raise IntentRefused(
        f"the {option} of a message for {message.actor_name} is empty or a {type(value).__name__}: give text"
    )
