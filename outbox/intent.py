"""The intent: one thing to be done at one participant.

Life of an intent:

1. The application *emits* it inside its own transaction: `Intent.make` checks it, the session hook
   (`outbox.session`) inserts it into `outbox.log` after the application's rows, in one statement.
2. The transaction commits. The intent is now promised: it ends applied, compensated or parked.
3. The clock takes a *tick* (a stored snapshot); the intent lies between two ticks.
4. The *reader* that owns the *lane* of its key fetches it, applies it at the *participant*, and moves
   the lane's *position* past it.
5. If that failed, it is *parked* with its reason, and later intents of the same key queue behind it.

This module is the value itself: no database, no I/O. It is made by `make` when it is written and by
`Intent(*row)` when it is read; reading never parses the payload, so that a row which Python can't read
(`1e5000`, 1,200 levels deep) can be parked like any other failure.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from outbox.errors import DepthExceeded, IntentRefused, PayloadInvalid, PayloadTooLarge, Permanent

PAYLOAD_LIMIT = 64 * 1024
"""Bytes of a payload as Postgres prints it. The log is read by every participant; large things are blobs."""

DEPTH_LIMIT = 64
"""Levels of nesting. Postgres takes 10,000, Python's reader fails at about 1,000: stay far below both."""

KEY_LIMIT = 512
"""Bytes of a key in UTF-8; it is indexed, and shown to operators."""

NAME = re.compile(r"[a-z][a-z0-9_.-]{0,62}")

_EXPONENT = re.compile(r"\de[+-]\d")

# Spaced like jsonb. Made once: json.dumps would make one for each payload.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(", ", ": "))

# Python refuses to read integers of more digits than this (sys.int_info.default_max_str_digits).
_INTEGER_DIGITS = 4300


class Intent(NamedTuple):
    """One thing to be done at one participant, as written or as read back from the log."""

    #: Place in the log; 0 until it is written. Drawn from a sequence, with gaps.
    id: int
    #: The participant: `index`, `blob`, `mail`, or a user's own.
    target: str
    #: What is to be done there: `put`, `delete`, `send`, …
    action: str
    #: Intents of one key are applied in the order of the log; different keys are independent.
    key: str
    #: The payload as JSON text; `payload` parses it.
    body: str
    #: Not before this time; None: now. An intent with a due time leaves its key's order.
    due: datetime | None = None
    #: The saga that this intent is a step of.
    saga: UUID | None = None
    #: Trace context and the like, as JSON text.
    headers: str | None = None

    @property
    def payload(self) -> Any:
        """The payload, parsed. Raises `Permanent` when Python can't read what Postgres accepted."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Permanent(
                f"the payload of intent {self.id} can't be read ({type(error).__name__}): "
                "correct what writes it, then skip this intent"
            ) from error

    @classmethod
    def make(
        cls,
        target: str,
        action: str,
        key: str,
        payload: Any,
        *,
        due: datetime | None = None,
        saga: UUID | None = None,
        headers: dict[str, str] | None = None,
    ) -> Intent:
        """An intent that is fit to be written.

        Raises a kind of `IntentRefused` with what to change, before anything reaches the database.
        """
        for what, name in (("target", target), ("action", action)):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise IntentRefused(
                    f"{what} {name!r} is not a name: use lower-case letters, digits, '_', '.', '-' (at most 63)"
                )
        if not isinstance(key, str) or not key:
            raise IntentRefused("the key is empty or not text: give the identity of what the intent is about")
        if "\x00" in key or len(_utf8(key, "key")) > KEY_LIMIT:
            raise IntentRefused(f"the key has a NUL or is over {KEY_LIMIT} bytes: use a shorter one, such as a hash")
        if due is not None and due.tzinfo is None:
            raise IntentRefused("due has no time zone: use an aware datetime, such as datetime.now(UTC)")
        return cls(
            0,
            target,
            action,
            key,
            payload_text(payload),
            due,
            saga,
            None if headers is None else payload_text(headers),
        )

    def about(self, model: str) -> Intent:
        """The same, with the name of the model that it is about in its headers."""
        headers = {} if self.headers is None else json.loads(self.headers)
        return self._replace(headers=payload_text(headers | {"model": model}))


def payload_text(payload: Any) -> str:
    """`payload` as the JSON text that goes into the log, or the reason why it can't.

    The text is spaced like Postgres prints jsonb, so that its length is what the table's CHECK measures.
    """
    _check_depth(payload)
    try:
        text = _ENCODER.encode(payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadInvalid(
            f"the payload is not JSON ({error}): use text, numbers, booleans, None, lists and dicts"
        ) from error
    size = len(_utf8(text, "payload"))
    if _EXPONENT.search(text):
        size += _spelled_out(payload)
    if size > PAYLOAD_LIMIT:
        raise PayloadTooLarge(
            f"the payload is {size:,} bytes, the limit is {PAYLOAD_LIMIT:,}: "
            "stage the large part with outbox.blobs.put() and name the blob in the payload"
        )
    if "\\u0000" in text:
        _check_nul(payload)
    return text


def _spelled_out(payload: Any) -> int:
    """Bytes by which Postgres prints the numbers of a payload longer than Python: 1e300 is 301 digits there."""
    more, level = 0, [payload]
    while level:
        value = level.pop()
        if isinstance(value, dict):
            level.extend(value.values())
        elif isinstance(value, list | tuple):
            level.extend(value)
        elif isinstance(value, float):
            short = repr(value)
            more += len(format(Decimal(short), "f")) - len(short)
    return more


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PayloadInvalid(f"the {what} has a lone surrogate, which is not Unicode text: repair it") from error


def _check_depth(payload: Any) -> None:
    """Refuse what is nested too deeply, and keys and numbers that change their meaning on the way."""
    level: list[Any] = [payload]
    for _ in range(DEPTH_LIMIT):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for name in value:
                    if not isinstance(name, str):
                        raise PayloadInvalid(
                            f"a key of the payload is a {type(name).__name__}: JSON has text keys only"
                        )
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            elif isinstance(value, int) and value.bit_length() > _INTEGER_DIGITS * 3:
                raise PayloadInvalid("an integer of the payload is too large for readers: send it as text")
        if not below:
            return
        level = below
    raise DepthExceeded(f"the payload is nested more than {DEPTH_LIMIT} levels deep: flatten it")


def _check_nul(payload: Any) -> None:
    if isinstance(payload, str):
        if "\x00" in payload:
            raise PayloadInvalid("the payload has a NUL character, which Postgres can't store: remove it")
    elif isinstance(payload, dict):
        for name, value in payload.items():
            _check_nul(name)
            _check_nul(value)
    elif isinstance(payload, list | tuple):
        for value in payload:
            _check_nul(value)
