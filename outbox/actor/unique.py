"""Unique messages: none is sent while another of its key is pending.

    @dramatiq.actor(unique_key=lambda customer: f"customer/{customer}")
    def refresh(customer: int) -> None: …

    sent = refresh.send(7)
    isinstance(sent, Duplicate)     # it is the one that is there already

Options of an actor, or of one message:

* `unique_key`: text; at the actor also a function of the message's arguments, which may return None; True: all of the
  arguments. At a message, None sends it in any case. Keys of different actors have nothing to do with each other.
* `unique_for`: milliseconds, or a timedelta, after a message was sent, in which no other one is, even if it is done.

Pending is what waits, runs, or is to be retried; not what was given up or skipped. What is decided commits, and rolls
back, with the sender's transaction, savepoints included. Called by `outbox.actor.broker`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any, LiteralString

import dramatiq

from outbox import sql
from outbox.errors import IntentRefused
from outbox.intent import KEY_LIMIT, Intent
from outbox.log import append_one

OPTIONS = frozenset({"unique_key", "unique_for"})

LONGEST = timedelta(days=3660)
"""The longest `unique_for`."""


class Duplicate(dramatiq.Message[Any]):
    """What a send returns when a message of its key is pending: nothing was sent. `message_id` is that one's, so that
    its result can be asked for; everything else is what was to be sent."""


def check(options: Mapping[str, Any], actor: str) -> None:
    """The options of an actor, when it is declared. Raises `ValueError`."""
    key = options.get("unique_key")
    if not (key is None or key is True or (isinstance(key, str) and key) or callable(key)):
        raise ValueError(f"unique_key of actor {actor} is not text, a function of its arguments, or True")
    if options.get("unique_for") is not None:
        if key is None:
            raise ValueError(f"actor {actor} has unique_for and no unique_key: say what is to be unique")
        _milliseconds(options["unique_for"], actor)


def settle(message: dramatiq.Message[Any], actor: dramatiq.Actor[Any, Any] | None) -> dramatiq.Message[Any]:
    """The message with its own key among its options, if it has one. Raises `IntentRefused`."""
    declared = {} if actor is None else actor.options
    wanted = {name: message.options.get(name, declared.get(name)) for name in OPTIONS}
    given = {name: value for name, value in message.options.items() if name not in OPTIONS}
    key = _key(wanted["unique_key"], message)
    if key is None:
        return message if len(given) == len(message.options) else _with(message, given)
    if "group_completion_uuid" in given:
        raise IntentRefused(
            f"a message of {message.actor_name} is unique and in a group with callbacks, which would wait for a "
            "duplicate for ever: send it with unique_key=None"
        )
    given["unique_key"] = key
    if wanted["unique_for"] is not None:
        try:
            given["unique_for"] = _milliseconds(wanted["unique_for"], message.actor_name)
        except ValueError as error:
            raise IntentRefused(str(error)) from None
    return _with(message, given)


def is_unique(message: dramatiq.Message[Any]) -> bool:
    """Whether it has a key, once `settle` has looked."""
    return message.options.get("unique_key") is not None


def statement(message: dramatiq.Message[Any], intent: Intent) -> tuple[LiteralString, tuple[Any, ...]]:
    """What writes `intent`, or finds the one that has the key of `message`; and its parameters."""
    if not is_unique(message):
        return sql.load("log_append_one"), append_one(intent)
    return sql.load("actor_unique"), (
        intent.target, intent.action, intent.key, intent.body, intent.due, intent.headers
    )  # fmt: skip


def refuse_step(draft: Intent) -> None:
    """A step of a saga waits for its own message. Raises `IntentRefused` for one that another can stand for."""
    fields = draft.payload
    if fields["options"].get("unique_key") is not None:
        raise IntentRefused(
            f"a step of a saga waits for its own message, and one of {fields['actor_name']} may be left out, because "
            "it is unique: make the message with message_with_options(…, unique_key=None)"
        )


def outcome(message: dramatiq.Message[Any], row: Sequence[Any]) -> dramatiq.Message[Any]:
    """`message`, or what has its key: as the row (xid, id, …) says, which was written or found."""
    if len(row) == 2 or row[3]:
        return message
    return Duplicate(**{**message.asdict(), "message_id": row[2]})


def _with(message: dramatiq.Message[Any], options: dict[str, Any]) -> dramatiq.Message[Any]:
    return type(message)(**{**message.asdict(), "options": options})


def _key(wanted: str | bool | Callable[..., str | None] | None, message: dramatiq.Message[Any]) -> str | None:
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return _of_arguments(message)
    key = wanted(*message.args, **message.kwargs) if callable(wanted) else wanted
    if key is None:
        return None
    if not isinstance(key, str) or not 1 <= len(key.encode(errors="replace")) <= KEY_LIMIT or "\x00" in key:
        raise IntentRefused(f"the unique key of {message.actor_name} is not text of 1 to {KEY_LIMIT} bytes: use a hash")
    return key


def _of_arguments(message: dramatiq.Message[Any]) -> str:
    # As the encoder writes them: what isn't JSON by itself may be by the application's own.
    fields = json.loads(message.encode())
    text = json.dumps([fields["args"], fields["kwargs"]], sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def _milliseconds(span: object, actor: str) -> int:
    if isinstance(span, timedelta):
        span = span // timedelta(milliseconds=1)
    if isinstance(span, bool) or not isinstance(span, int) or not 0 < span <= LONGEST // timedelta(milliseconds=1):
        raise ValueError(f"unique_for of {actor} is not a number of milliseconds, or a timedelta, of at most 10 years")
    return span
