"""A mail that is sent once more, because an operator asked for it.

It is a mail of its own: a token and a Message-ID of its own, which begins with `replay.`, and a header that names the
first one, so that neither a server nor a reader takes it for a duplicate that slipped through. All else stays as it
was, its Date too. Whom the first one was refused for (5xx) doesn't get it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from outbox.errors import Permanent
from outbox.intent import payload_text
from outbox.message import LINE_LIMIT

NAMES = "Outbox-Replay-Of"
"""The header that names the Message-ID of the mail that was sent first."""

_MESSAGE_ID = re.compile(r"^message-id:[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*", re.IGNORECASE | re.MULTILINE)


def resent(payload: Any, refused: set[int], seed: str) -> str | None:
    """The payload of the mail, as JSON text; None if nobody is left that it could go to.

    `refused` are indexes of recipients. The same `seed` makes the same mail. Raises `Permanent` if the payload is not
    a mail's.
    """
    try:
        head, blank, rest = payload["message"].partition("\r\n\r\n")
        before, domain = str(payload["message_id"]), str(payload["sender_domain"])
        recipients = [r for n, r in enumerate(payload["recipients"]) if n not in refused]
        token = hashlib.sha256(f"{seed}:{payload['token']}".encode()).hexdigest()[:32]
    except (AttributeError, KeyError, TypeError):
        raise Permanent("the payload is not a mail's: skip this intent") from None
    if not recipients:
        return None
    after = f"<replay.{token}@{domain}>"
    named = f"{NAMES}: {before}\r\n" if len(before) + len(NAMES) + 2 <= LINE_LIMIT else ""
    head, found = _MESSAGE_ID.subn(lambda _: f"Message-ID: {after}\r\n{named}", head + "\r\n", count=1)
    if not found or not blank or any(c in before for c in "\r\n"):
        raise Permanent("the mail has no Message-ID: skip this intent")
    return payload_text(
        payload | {"token": token, "message_id": after, "recipients": recipients, "message": head + "\r\n" + rest}
    )
