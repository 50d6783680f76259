"""Messages: a mail as the payload of an intent, rendered when the intent is written.

Called by `outbox.mail` and by anything that emits a mail itself; pure, no network, nothing is durable. The
payload holds the whole message and its envelope, so that what is sent never depends on the row it came from,
and every try sends the same bytes:

* Message-ID, Date and the MIME boundaries are fixed here. They and the envelope sender carry the *token*,
  which is what tells this mail from any other in a queue, a log or a Maildir.
* The text is ASCII with CRLF (RFC 5322; 8-bit parts become base64 or quoted-printable). Only where a header names
  an address that ASCII can't write (`jörg@example.org`) are the headers UTF-8 (RFC 6532), and the mail needs a
  server with SMTPUTF8. Such an address in `Bcc` alone needs it for itself only.
* `Bcc` is in the envelope and not in the message.

Raises `AddressInvalid` for an address or a header that can't be sent safely. Addresses are checked before
headers are built: `smtplib` and `email.utils.parseaddr` silently truncate an address that carries another.
The payload's limit (64 KiB, attachments included) is checked when the intent is made.
"""

from __future__ import annotations

import copy
import re
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email import policy
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, Literal

from outbox.errors import AddressInvalid, PayloadInvalid

InDoubt = Literal["resend", "hold", "drop"]
"""What to do when nobody can tell whether the mail left: send it again, ask an operator, or let it be."""

LINE_LIMIT = 998
"""Bytes of a line without its end (RFC 5322). Servers refuse longer ones, too late for the application."""

#: ASCII only, whatever the server offers: what 8BITMIME saves isn't worth a second form of each mail.
_POLICY = policy.SMTP.clone(cte_type="7bit")
_POLICY_UTF8 = _POLICY.clone(utf8=True)

# RFC 5321 dot-string, with RFC 6531's letters beyond ASCII. A quoted local part is legal, next to unused, and the
# usual way to smuggle a second address past a parser.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010ffff-]+"
_LOCAL = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_NAMED = re.compile(r"(?P<name>[^<>@]*)<(?P<address>[^<>]*)>")
_HEADER_NAME = re.compile(r"[!-9;-~]{1,76}")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
_MESSAGE_ID = re.compile(r"<[!-;=?A-~]+@[!-;=?A-~]+>")

#: The standard library's IDNA is that of 2003, which maps these to something else: another domain.
_IDNA_DIFFERS = frozenset("ßς\u200c\u200d")

_OWN_HEADERS = frozenset((
    "from", "to", "cc", "bcc", "subject", "date", "message-id", "sender", "return-path", "received", "mime-version",
))  # fmt: skip


def message_domain(domain: str, what: str = "domain") -> str:
    """`domain` in its ASCII form (`xn--…`). Raises `AddressInvalid`."""
    if not domain.isascii():
        if _IDNA_DIFFERS & set(domain.lower()):
            raise AddressInvalid(f"{what} has a domain whose encoding is ambiguous: write it in its xn-- form")
        try:
            domain = domain.encode("idna").decode("ascii")
        except UnicodeError:
            raise AddressInvalid(f"{what} has a domain that can't be encoded: correct it") from None
    if len(domain) > 253 or not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise AddressInvalid(f"{what} has no usable domain: write it like name@example.org")
    return domain


def message_address(address: str, what: str = "address") -> str:
    """`address` as it goes into an envelope, or `AddressInvalid`. `what` names the field, not the address.

    The domain comes back in ASCII, the name before it in Unicode's NFC. A name that isn't ASCII can be sent only
    to servers that offer SMTPUTF8; whether the next one does is found out when the mail is sent.
    """
    if not isinstance(address, str):
        raise AddressInvalid(f"{what} is a {type(address).__name__}: give text like name@example.org")
    _no_controls(address, what)
    # One form for what looks the same: servers compare bytes. First, because it can turn a letter into a sign.
    local, at, domain = unicodedata.normalize("NFC", address).rpartition("@")
    if not at or not local:
        raise AddressInvalid(f"{what} has no domain or no name before it: write it like name@example.org")
    # What isn't printable is blanks of all kinds, marks that turn the direction of writing, lone surrogates.
    if len(local.encode("utf-8", "replace")) > 64 or not local.isprintable() or not _LOCAL.fullmatch(local):
        raise AddressInvalid(f"{what} is not one plain address: write it like name@example.org, one in each entry")
    return f"{local}@{message_domain(domain, what)}"


def message_payload(
    *,
    domain: str,
    sender: str,
    to: Sequence[str] | str,
    cc: Sequence[str] | str = (),
    bcc: Sequence[str] | str = (),
    subject: str,
    text: str,
    html: str | None = None,
    headers: Mapping[str, str] | None = None,
    attachments: Sequence[tuple[str, str, bytes]] = (),
    in_doubt: InDoubt = "resend",
) -> dict[str, Any]:
    """The payload of a mail made from its parts.

    `domain` is the right-hand side of the Message-ID and of the envelope sender, where bounces go; `sender` is
    who it is from. Addresses are `name@example.org` or `Display Name <name@example.org>`. `attachments` are
    (file name, MIME type, bytes). `in_doubt` says what to do when nobody can tell whether the mail left.

    Raises `AddressInvalid`; `PayloadInvalid` for text that isn't Unicode.
    """
    origin = _parse(sender, "sender")
    parties = {what: _parse_all(given, what) for what, given in (("to", to), ("cc", cc), ("bcc", bcc))}
    message = EmailMessage(policy=_POLICY)
    try:
        message["From"] = origin
        for what in ("to", "cc"):
            if parties[what]:
                message[what.title()] = parties[what]
        _no_controls(subject, "subject")
        message["Subject"] = subject
        for name, value in (headers or {}).items():
            _check_header(name, value)
            message[name] = value
        message.set_content(text)
        if html is not None:
            message.add_alternative(html, subtype="html")
        for number, (name, kind, content) in enumerate(attachments):
            _attach(message, name, kind, content, f"attachments[{number}]")
    except UnicodeEncodeError:
        raise PayloadInvalid("the mail has a lone surrogate, which is not Unicode text: repair it") from None
    recipients = [party.addr_spec for group in parties.values() for party in group]
    return _payload(message, message_domain(domain), recipients, in_doubt)


def message_payload_from(
    message: EmailMessage,
    *,
    domain: str,
    sender: str | None = None,
    recipients: Sequence[str] | None = None,
    in_doubt: InDoubt = "resend",
) -> dict[str, Any]:
    """The payload of a mail that the application has built; `message` itself isn't changed.

    `sender` replaces the message's From. The envelope goes to `recipients`, or else to everyone in To, Cc and
    Bcc. A Message-ID and a Date that the message has are kept. Raises like `message_payload`.
    """
    ours = copy.deepcopy(message)
    for name, value in ours.items():
        _no_controls(str(value), f"header {name}" if _HEADER_NAME.fullmatch(name) else "a header")
    if sender is not None:
        del ours["From"]
        ours["From"] = _parse(sender, "sender")
    if not ours["From"]:
        raise AddressInvalid("the mail has no sender: set From in the message, or give sender=")
    if recipients is None:
        recipients = []
        for field in ("To", "Cc", "Bcc"):
            for header in ours.get_all(field, []):
                recipients += [address.addr_spec for address in header.addresses]
    del ours["Bcc"]
    checked = [message_address(address, f"recipients[{n}]") for n, address in enumerate(recipients)]
    return _payload(ours, message_domain(domain), checked, in_doubt)


def _payload(message: EmailMessage, domain: str, recipients: Sequence[str], in_doubt: InDoubt) -> dict[str, Any]:
    if not recipients:
        raise AddressInvalid("the mail has no recipient: give one in to, cc or bcc")
    if in_doubt not in ("resend", "hold", "drop"):
        raise AddressInvalid("in_doubt is none of resend, hold, drop: choose one")
    token = uuid.uuid4().hex
    if message["Message-ID"] is None:
        message["Message-ID"] = f"<{token}@{domain}>"
    elif not _MESSAGE_ID.fullmatch(str(message["Message-ID"])):
        raise AddressInvalid("the Message-ID is not of the form <name@domain>: correct it, or leave it out")
    if message["Date"] is None:
        message["Date"] = format_datetime(datetime.now(UTC))
    for number, part in enumerate(part for part in message.walk() if part.is_multipart()):
        if part.get_content_maintype() == "multipart":
            part.set_boundary(f"=_{token}_{number}")
    return {
        "token": token,
        "message_id": str(message["Message-ID"]),
        "recipients": list(dict.fromkeys(recipients)),
        "sender_domain": domain,
        "in_doubt": in_doubt,
        "message": _render(message),
    }


def _render(message: EmailMessage) -> str:
    addresses = [address for _, header in message.items() for address in getattr(header, "addresses", ())]
    unicode = not all(address.addr_spec.isascii() for address in addresses)
    try:
        text = message.as_bytes(policy=_POLICY_UTF8 if unicode else _POLICY).decode("utf-8" if unicode else "ascii")
    except (UnicodeError, MessageError, ValueError, LookupError) as error:
        raise PayloadInvalid(
            f"the mail can't be written as ASCII ({type(error).__name__}): "
            "set its parts with set_content() and add_attachment(), which encode them"
        ) from None
    if any(len(line.encode()) > LINE_LIMIT for line in text.split("\r\n")):
        raise PayloadInvalid(
            f"the mail has a line of more than {LINE_LIMIT} bytes, which servers refuse: "
            "shorten the header, or set the part with set_content(), which folds it"
        )
    return text


def _no_controls(text: str, what: str) -> None:
    # Cc are the control characters with CR, LF and NUL; the two separators break lines in some parsers.
    if any(character < " " or "\x7f" <= character <= "\x9f" or character in "\u2028\u2029" for character in text):
        raise AddressInvalid(f"{what} has a line break or another control character: remove it")


def _parse(entry: str, what: str) -> Address:
    """`name@example.org` or `Display Name <name@example.org>`."""
    if not isinstance(entry, str):
        raise AddressInvalid(f"{what} is a {type(entry).__name__}: give text like name@example.org")
    _no_controls(entry, what)
    name, address = "", entry.strip()
    if match := _NAMED.fullmatch(address):
        name, address = match["name"].strip().strip('"'), match["address"]
    local, _, domain = message_address(address, what).rpartition("@")
    return Address(name, local, domain)


def _parse_all(entries: Sequence[str] | str, what: str) -> list[Address]:
    if isinstance(entries, str):
        return [_parse(entries, what)]
    return [_parse(entry, f"{what}[{number}]") for number, entry in enumerate(entries)]


def _check_header(name: str, value: str) -> None:
    if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
        raise AddressInvalid("a header's name is not printable ASCII without a colon: correct it")
    if name.lower() in _OWN_HEADERS or name.lower().startswith("content-"):
        raise AddressInvalid(f"header {name} is set by the mail itself: use the argument for it, or build the message")
    if not isinstance(value, str):
        raise AddressInvalid(f"header {name} is a {type(value).__name__}: give text")
    _no_controls(value, f"header {name}")


def _attach(message: EmailMessage, name: str, kind: str, content: bytes, what: str) -> None:
    _no_controls(name, what)
    main, _, sub = kind.partition("/")
    if not _TYPE.fullmatch(kind) or main.lower() in ("multipart", "message"):
        raise AddressInvalid(f"{what} has no usable MIME type: write it like application/pdf")
    message.add_attachment(content, maintype=main, subtype=sub, filename=name)
