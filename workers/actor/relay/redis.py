"""Redis as the broker that messages are relayed to: dramatiq's keys, written by dramatiq's own script, many in one go.

A message counts as handed on when Redis has answered. How much that is worth is Redis's configuration: with `appendonly
yes` and `appendfsync always` it is on the disk then. With less, a crash of Redis loses what was confirmed in the last
second, or everything; `weakness` says so, and the relay logs it when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from uuid import uuid4

import dramatiq
import redis
from dramatiq.brokers.redis import MAINTENANCE_SCALE, RedisBroker
from dramatiq.common import current_millis

from outbox.errors import NotReady, Unavailable
from workers.actor.relay.address import Address
from workers.actor.relay.link import CONFIRM_WITHIN, Fate, Letter

_SCRIPT = "dispatch"
_KEEPING = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")
"""Policies under which Redis never drops dramatiq's keys, which have no time to live."""


class Redis:
    """A link to Redis."""

    def __init__(self, address: Address) -> None:
        options: dict[str, Any] = {"socket_timeout": CONFIRM_WITHIN, "socket_connect_timeout": CONFIRM_WITHIN}
        if address.tls and address.ca_file is not None:
            options["ssl_ca_certs"] = str(address.ca_file)
        try:
            pool = redis.ConnectionPool.from_url(address.url, **options)
        except (ValueError, TypeError):
            raise NotReady(
                "the address of Redis has something behind the host that is not understood: correct OUTBOX_RELAY"
            ) from None
        self._client = redis.Redis(connection_pool=pool)
        self._broker = RedisBroker(client=self._client, middleware=[])

    def send(self, letters: Sequence[Letter]) -> list[Fate]:
        try:
            # dramatiq's script, with what `RedisBroker.enqueue` gives it.
            script = self._broker.scripts[_SCRIPT]
            most = self._broker._max_unpack_size()  # noqa: SLF001 - each command of the script has to be told
            pipeline = self._client.pipeline(transaction=False)
            for letter in letters:
                message = dramatiq.Message.decode(letter.body)
                name = str(uuid4())
                body = message.copy(options={"redis_message_id": name}).encode()
                script(
                    keys=[self._broker.namespace],
                    args=[
                        "enqueue", current_millis(), letter.queue, self._broker.broker_id,
                        self._broker.heartbeat_timeout, self._broker.dead_message_ttl, 0, most, name, body,
                    ],
                    client=pipeline,
                )  # fmt: skip
            answers = pipeline.execute(raise_on_error=False)
        except redis.RedisError as error:
            raise Unavailable(_refusal(error)) from None
        taken = next((i for i, answer in enumerate(answers) if isinstance(answer, Exception)), len(answers))
        if taken == 0:
            raise Unavailable(_refusal(answers[0]))
        return [Fate.TAKEN] * taken

    def weakness(self) -> str | None:
        """What a crash of Redis would lose of what it has confirmed; None: nothing. Raises `Unavailable`."""
        try:
            found = cast("dict[str, str]", self._client.config_get("append*"))
            policy = cast("dict[str, str]", self._client.config_get("maxmemory-policy"))
        except redis.ResponseError:
            return "Redis doesn't tell how it is configured: make sure of appendonly yes and appendfsync always"
        except redis.RedisError as error:
            raise Unavailable(_refusal(error)) from None
        if found.get("appendonly") != "yes":
            return (
                "Redis writes no log (appendonly no): a crash loses messages that were relayed, and nothing sends them "
                "again. Set appendonly yes and appendfsync always"
            )
        if found.get("appendfsync") != "always":
            return (
                "Redis writes its log only now and then (appendfsync is not always): a crash of its machine loses what "
                "was relayed in the last second or more, and nothing sends it again. Set appendfsync always"
            )
        if policy.get("maxmemory-policy", "noeviction") not in _KEEPING:
            return "Redis drops keys when its memory is full, messages too: set maxmemory-policy noeviction"
        return None

    def broker(self) -> RedisBroker:
        # What a relay that died had fetched comes back by dramatiq's maintenance: with each look, and not now and then.
        return RedisBroker(client=self._client, middleware=[], maintenance_chance=MAINTENANCE_SCALE)

    def close(self) -> None:
        self._client.close()


def _refusal(error: BaseException) -> str:
    """By kind, and by the code word that Redis begins its errors with; the rest may quote anything."""
    if isinstance(error, redis.AuthenticationError):
        return "Redis doesn't let us in: correct user and password in OUTBOX_RELAY"
    if isinstance(error, redis.ResponseError):
        word = str(error).split(" ", 1)[0]
        code = word if word.isupper() and word.isalpha() else type(error).__name__
        return f"Redis takes no messages at the moment ({code}): see its log"
    return f"Redis can't be reached ({type(error).__name__})"
