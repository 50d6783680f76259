"""The rate: how often messages of an actor may begin.

    @dramatiq.actor(rate_limit="100/m")                     # at most 100 begin in any minute
    @dramatiq.actor(rate_limit="5/10s", rate_key=lambda account, *_: f"account {account}")

However many workers there are: each message asks the database when it is about to begin (`outbox.rate_ask`), and what
begins counts, whether it goes well or not. One that is over the limit is put back until its time comes, which is no
try and no failure; meanwhile it is nobody's load. Messages of one key share one limit, whichever actors they are for;
without a `rate_key`, an actor's messages have their own.

Called by `outbox.actor.broker` (an actor is declared, a message is sent, a message is about to begin) and by
`workers.actor.intake`, which puts most of those back that are over the limit before a thread has to ask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import dramatiq

from outbox import sql
from outbox.actor.delivered import Delivered
from outbox.database import Connection
from outbox.errors import IntentRefused
from outbox.failpoint import hit

OPTIONS = frozenset({"rate_limit", "rate_key"})
"""What an actor may say about it. A message may say `rate_key`."""

KEY_LIMIT = 400
"""Characters of a key."""

_RATE = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,5})?(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Rate(NamedTuple):
    """How many in how many seconds."""

    places: int
    period: float

    @classmethod
    def read(cls, text: object) -> Rate:
        """`"100/m"`, `"5/10s"`: units are s, m, h, d. Raises `ValueError`."""
        found = _RATE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f'rate_limit={text!r} is no rate: say how many in which time, such as "100/m" or "5/10s"')
        return cls(int(found[1]), float(int(found[2] or 1) * _SECONDS[found[3]]))


class Rates:
    """The rates of one broker's actors."""

    def __init__(self) -> None:
        self._rates: dict[str, Rate] = {}

    def __bool__(self) -> bool:
        return bool(self._rates)

    def declare(self, actor: dramatiq.Actor[..., Any]) -> None:
        """Take an actor's rate down. Raises `ValueError` for options that can't be meant."""
        self._rates.pop(actor.actor_name, None)
        text, key = actor.options.get("rate_limit"), actor.options.get("rate_key")
        if key is not None and not isinstance(key, str) and not callable(key):
            raise ValueError(f"rate_key of {actor.actor_name} is neither a string nor a function of its arguments")
        if text is not None:
            self._rates[actor.actor_name] = Rate.read(text)
        elif key is not None:
            raise ValueError(f"{actor.actor_name} has a rate_key and no rate_limit: say both, or neither")

    def stamped(self, actor: dramatiq.Actor[..., Any] | None, message: dramatiq.Message[Any]) -> dramatiq.Message[Any]:
        """The message with its key, as its actor has it from its arguments. Raises `IntentRefused`."""
        key = message.options.get("rate_key")
        if key is None:
            if actor is None or actor.actor_name not in self._rates or not callable(actor.options.get("rate_key")):
                return message
            try:
                key = actor.options["rate_key"](*message.args, **message.kwargs)
            except Exception as error:
                raise IntentRefused(
                    f"the rate_key of {message.actor_name} raised {type(error).__name__}: it is given its arguments"
                ) from error
        if not isinstance(key, str) or not 0 < len(key) <= KEY_LIMIT or "\0" in key:
            raise IntentRefused(f"a rate_key of {message.actor_name} is no string of 1 to {KEY_LIMIT} characters")
        return message.copy(options={"rate_key": key})

    def waits(
        self,
        conn: Connection,
        messages: Sequence[Delivered],
        actors: dict[str, dramatiq.Actor[..., Any]],
        *,
        begins: bool,
    ) -> dict[int, float]:
        """Those of `messages` that are over their limits → seconds to wait. `begins`: the others begin now."""
        asking = [message for message in messages if message.actor_name in self._rates]
        if not asking:
            return {}
        rates = [self._rates[message.actor_name] for message in asking]
        row = conn.execute(
            sql.load("rate_ask"),
            {
                "keys": [_key(message, actors[message.actor_name]) for message in asking],
                "places": [rate.places for rate in rates],
                "periods": [rate.period for rate in rates],
                "again": [message.hold.holder is not None for message in asking],
                "begins": begins,
            },
        ).fetchone()
        if begins:
            hit("actor.placed")
        assert row is not None  # noqa: S101 - it is a function's value
        return {message.id: wait for message, wait in zip(asking, row[0], strict=True) if wait > 0}


def _key(message: Delivered, actor: dramatiq.Actor[..., Any]) -> str:
    key = message.options.get("rate_key", actor.options.get("rate_key"))
    # One that was sent before its actor had a key counts with those that have none.
    return f"key {key}" if isinstance(key, str) else f"actor {message.actor_name}"
