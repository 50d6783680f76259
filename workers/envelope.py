"""The envelope: whom a mail goes to and under which sender, read from the payload of an intent.

Called by `workers.mail` and by what looks for evidence; pure.

The envelope sender names the intent (VERP, after D. J. Bernstein), because it is the only thing that a mail
server writes down exactly when it has taken a message: `b+<token>@<domain>` for a message to all recipients
of the intent. When a server takes only some of them, the message goes out in *parts*, and the sender names the
recipients of each: `b+<token>.<first>.<mask>@<domain>`, a bit in the hexadecimal mask for each recipient from
the first on. So what is found later says which recipients it was for, even if the worker died in between.

Recipients whose address isn't ASCII are a part of their own, unless the message itself needs SMTPUTF8: a server on
the way that doesn't know it must not cost the others their mail.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from outbox.errors import Permanent
from outbox.intent import Intent
from outbox.message import InDoubt, message_address, message_domain

SENDER = re.compile(r"b\+(?P<token>[0-9a-f]{32})(?P<part>(?:\.[0-9]{1,4}\.[0-9a-f]{1,24})?)@")
"""An envelope sender of ours, wherever it is written down."""

WHOLE = ""
"""The part that is all recipients."""

_PART = 64
"""Recipients in one part, at most: so many bits and the token must fit into the 64 characters of a local part,
in the sender and behind the name of a receipt's recipient (`workers.postmark`)."""

TOKEN = re.compile(r"[0-9a-f]{32}")
"""What names a mail, in its payload, its envelope sender and the intents that release or withdraw it."""

_BARE_LINE_END = re.compile(r"\r(?!\n)|(?<!\r)\n")


class Envelope(NamedTuple):
    """A mail that can be sent as it is."""

    token: str
    recipients: tuple[str, ...]
    domain: str
    #: What to do when nobody can tell whether it left.
    in_doubt: InDoubt
    data: bytes

    @classmethod
    def read(cls, intent: Intent) -> Envelope:
        """The envelope of an intent.

        Raises `Permanent` for a payload that isn't a mail. Everything is checked again here: a payload may have
        been written by any client of the log.
        """
        if intent.action not in ("send", "prepare"):
            raise Permanent(
                "mail knows the actions send, prepare, release and withdraw: correct what writes the intent"
            )
        payload = intent.payload
        try:
            token, text = payload["token"], payload["message"]
            recipients, in_doubt = payload["recipients"], payload.get("in_doubt", "resend")
            domain = message_domain(payload["sender_domain"], "sender_domain")
        except (TypeError, KeyError, AttributeError):
            raise _malformed("lacks what message_payload() puts there") from None
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise _malformed("has no token of 32 hexadecimal digits")
        if not isinstance(recipients, list) or not 0 < len(recipients) <= 10_000:
            raise _malformed("has no list of recipients")
        if in_doubt not in ("resend", "hold", "drop"):
            raise _malformed("has an in_doubt that is none of resend, hold, drop")
        if not isinstance(text, str) or "\x00" in text or _BARE_LINE_END.search(text):
            raise _malformed("has a message that is not text with CRLF")
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise _malformed("has a message with a lone surrogate") from None
        return cls(token, _checked(recipients), domain, cast("InDoubt", in_doubt), data)

    def sender(self, part: str) -> str:
        """The envelope sender of a part."""
        return f"b+{self.token}{part}@{self.domain}"

    def part(self, numbers: tuple[int, ...]) -> str:
        """The name of the part that is the recipients `numbers`, which `split` has made."""
        if len(numbers) == len(self.recipients):
            return WHOLE
        return f".{numbers[0]}.{sum(1 << (number - numbers[0]) for number in numbers):x}"

    def numbers(self, part: str) -> Iterable[int]:
        """The recipients of a part that was found somewhere."""
        if part == WHOLE:
            return range(len(self.recipients))
        bits = part_bits(part)
        return [number for number in range(len(self.recipients)) if bits >> number & 1]

    def split(self, numbers: Iterable[int]) -> list[tuple[int, ...]]:
        """`numbers`, in order, as groups that can be named and sent: one group if it is all recipients."""
        todo = tuple(numbers)
        apart = [n for n in todo if not self.recipients[n].isascii()] if self.data.isascii() else []
        if apart and len(apart) < len(todo):
            return [group for kind in (set(todo) - set(apart), apart) for group in self._parts(tuple(sorted(kind)))]
        return [todo] if len(todo) == len(self.recipients) else self._parts(todo)

    @staticmethod
    def _parts(todo: tuple[int, ...]) -> list[tuple[int, ...]]:
        groups: list[tuple[int, ...]] = []
        while todo:
            groups.append(tuple(number for number in todo if number < todo[0] + _PART))
            todo = todo[len(groups[-1]) :]
        return groups


def part_bits(part: str) -> int:
    """The recipients of a part that isn't the whole: a bit for each."""
    _, first, mask = part.split(".")
    return int(mask, 16) << int(first)


def _checked(recipients: list[Any]) -> tuple[str, ...]:
    return tuple(message_address(address, f"recipients[{number}]") for number, address in enumerate(recipients))


def _malformed(what: str) -> Permanent:
    return Permanent(f"the payload {what}: write mails with outbox.mail or message_payload(), then skip this intent")
