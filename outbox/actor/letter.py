"""The letter: a message of dramatiq as it lies in the log.

A queue is a participant of its own, `actor.QUEUE`: a worker that serves some queues has nothing to do with the lanes of
the others. The payload is the message as dramatiq's encoder writes it, so that a JSON encoder of one's own is honoured;
what is not JSON (pickle) is refused. Used by `outbox.actor.broker`, which writes them, and by `workers.actor`, which
reads them. No I/O.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from datetime import UTC, datetime
from hashlib import md5
from typing import Any
from uuid import UUID

import dramatiq
from dramatiq.common import q_name

from outbox.actor.turn import Turn, turn_in
from outbox.errors import PayloadInvalid, Permanent
from outbox.intent import Intent

ACTION = "send"
"""What is to be done with a message that waits for no turn (`outbox.actor.turn`)."""

_JSON = json.JSONDecoder()
_NUMBER = (int, float)

_PREFIX = "actor."
_PLAIN = re.compile(r"[a-z0-9_.-]{1,57}")


def target_of(queue: str) -> str:
    """The participant of a queue. One whose name can't be a participant's (capitals, length) is told by a hash."""
    queue = q_name(queue)
    if _PLAIN.fullmatch(queue):
        return _PREFIX + queue
    digest = md5(queue.encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{_PREFIX}{re.sub('[^a-z0-9_.-]', '_', queue.lower())[:48]}.{digest}"


def intent_of(
    message: dramatiq.Message[Any], *, turn: Turn | None = None, due: datetime | None = None, saga: UUID | None = None
) -> Intent:
    """The intent that a message becomes. Messages of one turn's key share a lane; without one, each has its own key.

    Raises `PayloadInvalid` and `PayloadTooLarge` (64 KiB).
    """
    try:
        fields = json.loads(message.encode())
    except (ValueError, UnicodeDecodeError):
        raise PayloadInvalid(
            "dramatiq's encoder doesn't write JSON, and nothing else goes into the log: use dramatiq.JSONEncoder"
        ) from None
    if not isinstance(fields, dict):
        raise PayloadInvalid("dramatiq's encoder doesn't write a JSON object: use dramatiq.JSONEncoder")
    action, key = (ACTION, message.message_id) if turn is None else (turn.action, turn.key)
    return Intent.make(target_of(message.queue_name), action, key, fields, due=due, saga=saga)


def due_of(message: dramatiq.Message[Any]) -> datetime | None:
    """The time before which a message is not to be run; None: now."""
    eta = message.options.get("eta")
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        return None
    return None if eta / 1000 <= time.time() else datetime.fromtimestamp(eta / 1000, UTC)


def message_of(intent: Intent, options: dict[str, Any] | None = None) -> dramatiq.Message[Any]:
    """The message that an intent was, ready to be run: whatever delayed it is over.

    `options` are those that an earlier try has left. Raises `Permanent` for what is not a message.
    """
    if intent.action != ACTION and turn_in(intent) is None:
        raise Permanent(f"a queue knows no action {intent.action!r}: skip this intent")
    try:
        message = _decode(intent.body)
        if options is None and "eta" not in message.options and message.queue_name == q_name(message.queue_name):
            return message  # as nearly all are
        options = {**message.options, **(options or {})}
    except (dramatiq.DecodeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise Permanent(
            "the intent is not a message of dramatiq: write it by actor.send(), and skip this one"
        ) from error
    options.pop("eta", None)
    return dataclasses.replace(message, queue_name=q_name(message.queue_name), options=options)


def _decode(body: str) -> dramatiq.Message[Any]:
    """As `dramatiq.Message.decode` does it, but no message has fields of the wrong kind: dramatiq's own code fails on
    them, where it is nobody's error. Its detours through bytes are left out."""
    if type(dramatiq.get_encoder()) is not dramatiq.JSONEncoder:
        return _checked(dramatiq.Message.decode(body.encode()))
    fields, _ = _JSON.raw_decode(body)
    fields["args"] = tuple(_list(fields["args"]))
    return _checked(dramatiq.Message(**fields))


def _list(args: object) -> list[Any]:
    if not isinstance(args, list):
        raise TypeError("the arguments are no list")
    return args


def _checked(message: dramatiq.Message[Any]) -> dramatiq.Message[Any]:
    if not (
        isinstance(message.queue_name, str)
        and isinstance(message.actor_name, str)
        and isinstance(message.kwargs, dict)
        and isinstance(message.options, dict)
        and isinstance(message.message_id, str)
        and isinstance(message.message_timestamp, _NUMBER)
    ):
        raise TypeError("a field is of the wrong kind")
    return message
