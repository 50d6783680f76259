"""The link: what the relay needs of a broker.

One link serves one lane, from one thread. Made by `open_link`, which connects to nothing. Raises `NotReady` without
the packages that dramatiq needs for the broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import dramatiq

from outbox.errors import NotReady
from workers.actor.relay.address import Address

CONFIRM_WITHIN = 60.0
"""Seconds that a broker may take to confirm a message, or to answer at all."""


class Fate(Enum):
    """What a broker did with a message."""

    #: It has it, as durably as it holds messages at all.
    TAKEN = "taken"
    #: It takes none of this queue just now: its limit is reached.
    FULL = "full"
    #: It doesn't take this one, ever: it is too large.
    REFUSED = "refused"


class Letter(NamedTuple):
    """A message to be handed on."""

    #: The intent's id: the same whenever it is handed on again. So is the message's own, in `name`.
    id: int
    name: str
    queue: str
    body: bytes
    #: Of RabbitMQ's queues that have priorities: dramatiq's `broker_priority`.
    priority: int | None = None


class Link(Protocol):
    """A broker, and the way to it."""

    def send(self, letters: Sequence[Letter]) -> list[Fate]:
        """Hand messages on, in order. → what became of each; fewer if the broker went away in the middle.

        Raises `Unavailable` if it was away from the start.
        """

    def broker(self) -> dramatiq.Broker:
        """dramatiq's own broker, with no middleware: to consume from."""

    def close(self) -> None:
        """Let go of connections."""


def open_link(address: Address, *, max_priority: int | None = None) -> Link:
    """The link to a broker. `max_priority`: of RabbitMQ's queues that are made here, as its workers have it."""
    package = "pika" if address.kind == "rabbitmq" else "redis"
    if find_spec(package) is None:
        raise NotReady(f"the package {package} is not installed: pip install 'postgres-outbox[relay]'")
    # Each needs its own package only.
    if address.kind == "rabbitmq":
        from workers.actor.relay.rabbit import Rabbit  # noqa: PLC0415

        return Rabbit(address, max_priority=max_priority)
    from workers.actor.relay.redis import Redis  # noqa: PLC0415

    return Redis(address)
