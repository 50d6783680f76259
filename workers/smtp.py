"""A client's side of SMTP: one connection, one message at a time, and exact knowledge of what was sent.

Used by `workers.mail`. SMTP has one point of no return, the dot that ends the message: before its last byte is
handed to the system, a server can't have taken the message; after the reply it is known; in between nobody
knows. `submit` keeps the three apart:

* it returns: every recipient was accepted (durable at the server, by its promise), deferred or refused.
* `Unavailable`: nothing was taken. The server can't be reached, is closing (421), went before the dot, or says
  what isn't SMTP.
* `Ambiguous`: the connection was lost after the dot, before the reply.

After either exception the connection is closed, and stays closed until `connect`: only the caller knows whether
it may still send. Nothing here names an address or quotes a server's text, which does: errors carry codes.
"""

from __future__ import annotations

import re
import smtplib
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from outbox.errors import Ambiguous, Permanent, Unavailable
from workers.dialogue import Dialogue, Garbled, Reply
from workers.relay import Relay

_QUEUE_ID = re.compile(rb"(?:queued as|\bid=)\s*([A-Za-z0-9.-]{1,64})")
_COMMANDS_AT_ONCE = 100
"""Replies to more than so many pipelined commands could fill both buffers, and both sides would wait."""

CLOSING = 421


class Submission(NamedTuple):
    """What became of a message, by index of the recipient. All are accepted, or none is."""

    #: The server's name for the message, "" if it told none; None if it didn't take it.
    queue_id: str | None
    #: Recipients that can be tried again, with the reason.
    deferred: dict[int, Reply]
    #: Recipients that can't.
    refused: dict[int, Reply]


class SmtpSession:
    """A connection to one server, kept open between messages."""

    def __init__(self, relay: Relay, name: str, *, timeout: float = 30.0, reply_timeout: float = 120.0) -> None:
        self.relay = relay
        #: What EHLO says. The embedded server ends an older session of the same lane by it (`workers.mailserver`).
        self.name = name
        #: Seconds for a whole reply, however it comes.
        self.timeout = timeout
        #: Seconds for the message, and again for the reply to the dot. Generous: giving up leaves it in doubt.
        self.reply_timeout = reply_timeout
        self._connection: Dialogue | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a session, as far as is known here."""
        return self._connection is not None and self._connection.sock is not None

    def connect(self) -> None:
        """Have a session: the one there is, unless the server has ended it. Raises `Unavailable`."""
        if self._connection is not None:
            if self._connection.quiet():
                return
            self._drop()
        try:
            connection = self._connection = Dialogue(self.relay, self.name, self.timeout)
            hello = self._greet(connection)
        except ssl.SSLCertVerificationError:
            self._drop()
            raise Unavailable(
                "the mail server's certificate is not to be trusted, or is for another name: "
                "correct the host in OUTBOX_SMTP, or name the authority's certificate in OUTBOX_SMTP_CA_FILE"
            ) from None
        except (OSError, smtplib.SMTPException, ValueError) as error:
            self._drop()
            raise Unavailable(
                f"the mail server can't be reached ({type(error).__name__}): start it, or correct OUTBOX_SMTP"
            ) from None
        except BaseException:
            self._drop()
            raise
        if hello.code not in (220, 250):
            self._drop()
            raise Unavailable(f"the mail server takes no session now ({hello}): see its log")

    def _greet(self, connection: Dialogue) -> Reply:
        """Begin the session: TLS and login as the relay wants them. → the last reply; good, or why not."""
        reply = Reply.read(*connection.getreply())
        if reply.code != 220:
            return reply
        reply = Reply.read(*connection.ehlo(self.name))
        if reply.good and self.relay.security == "starttls":
            if not connection.begin_tls():
                raise Unavailable("the mail server offers no STARTTLS: enable it there, or correct OUTBOX_SMTP")
            reply = Reply.read(*connection.ehlo(self.name))
        if reply.good and self.relay.user is not None:
            self._log_in(connection, self.relay.user)
        return reply

    def _log_in(self, connection: Dialogue, user: str) -> None:
        if not connection.private():
            raise Unavailable(
                "the mail server is not on this machine, and TLS is off: use smtp+starttls:// or smtps://"
            )
        try:
            connection.login(user, self.relay.password())
        except smtplib.SMTPAuthenticationError as error:
            raise Unavailable(
                f"the mail server doesn't let this user in ({error.smtp_code}): "
                "correct the user in OUTBOX_SMTP, or the password in OUTBOX_SMTP_PASSWORD_FILE"
            ) from None
        except (Garbled, smtplib.SMTPServerDisconnected):
            raise
        except smtplib.SMTPException:
            raise Unavailable(
                "the mail server offers no way to log in that is known here (PLAIN, LOGIN, CRAM-MD5): "
                "enable one there, or take the user out of OUTBOX_SMTP"
            ) from None

    def reconnect(self) -> None:
        """Have a new session. Raises `Unavailable`."""
        self._drop()
        self.connect()

    def close(self) -> None:
        """End the session politely; no error if it is gone."""
        if self._connection is not None and self._connection.sock is not None:
            self._connection.patience = 1.0
            with suppress(OSError, smtplib.SMTPException):
                self._connection.quit()
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def submit(self, sender: str, recipients: Sequence[str], data: bytes, *, receipt: str | None = None) -> Submission:
        """Hand over a message for all of `recipients`, or for none.

        If the server takes only some of them, nothing is sent: the caller decides what to do about the rest,
        and says by the envelope sender for whom the message is. `receipt` is one recipient more, without whom
        nothing is sent either. Addresses and `data` (CRLF; UTF-8 needs a server with SMTPUTF8) must have been
        checked; a line break in an address raises `Permanent` all the same.

        Raises `Unavailable` or `Ambiguous`; the connection is closed then.
        """
        connection = self._connection
        if connection is None or connection.sock is None:
            raise Unavailable("there is no session with the mail server: the lane connects again")
        if beyond := _beyond(connection, recipients, data):
            return Submission(None, {}, beyond)
        try:
            return self._submit(connection, sender, recipients, data, receipt)
        except (OSError, smtplib.SMTPException) as error:
            # Everything after the dot raises Ambiguous itself.
            self._drop()
            raise Unavailable(
                f"the mail server went away before it had the message ({type(error).__name__}): see its log"
            ) from None
        except BaseException:
            self._drop()
            raise

    def _submit(
        self, connection: Dialogue, sender: str, recipients: Sequence[str], data: bytes, receipt: str | None
    ) -> Submission:
        size = f" SIZE={len(data)}" if connection.has_extn("size") else ""
        unicode = "" if data.isascii() and all(map(str.isascii, recipients)) else " BODY=8BITMIME SMTPUTF8"
        # The receipt's recipient goes first: a limit on their number must not hit it.
        everybody = [*([receipt] if receipt else []), *recipients]
        mail, *rcpts = _exchange(
            connection, [f"MAIL FROM:<{sender}>{size}{unicode}", *(f"RCPT TO:<{address}>" for address in everybody)]
        )
        if receipt and not (taken := rcpts.pop(0)).good and mail.good:
            raise Unavailable(f"the mail server doesn't take the receipt's recipient ({taken}): see its log")
        failed = {number: reply for number, reply in enumerate(rcpts) if not reply.good}
        if not mail.good:
            if mail.deferred and mail.status.startswith("4.3."):
                # "Mail system status": full, or not taking mail at all. It's not about this message.
                raise Unavailable(f"the mail server has no room for mail now ({mail}): see its log")
            failed = dict.fromkeys(range(len(recipients)), mail)
        if not failed:
            data_reply = _exchange(connection, ["DATA"])[0]
            if data_reply.code == 354:
                final, queue_id = self._send(connection, data)
                if final.good:
                    return Submission(queue_id, {}, {})
                data_reply = final
            failed = dict.fromkeys(range(len(recipients)), data_reply)
        self._reset(connection)
        return Submission(
            None,
            {number: reply for number, reply in failed.items() if reply.deferred},
            {number: reply for number, reply in failed.items() if not reply.deferred},
        )

    def _send(self, connection: Dialogue, data: bytes) -> tuple[Reply, str]:
        """Headers, body and dot in one write: of two small ones the second waits 40 ms (Nagle)."""
        end = b".\r\n" if data.endswith(b"\r\n") else b"\r\n.\r\n"
        sock = connection.sock
        if sock is None or not connection.quiet():
            raise Garbled
        left, deadline = memoryview(re.sub(rb"(?m)^\.", b"..", data) + end), time.monotonic() + self.reply_timeout
        while left:
            # Counted by hand: when this raises, the end of the dot was not handed over, and can't arrive. That holds
            # for TLS as well: a record that is not sent whole is none.
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            left = left[sock.send(left) :]
        connection.patience = self.reply_timeout
        try:
            code, text = connection.getreply()
        except (OSError, smtplib.SMTPException) as error:
            raise Ambiguous(
                f"the mail server went away between the message and its answer ({type(error).__name__})"
            ) from None
        connection.patience = self.timeout
        if code == CLOSING:
            raise smtplib.SMTPServerDisconnected
        found = _QUEUE_ID.search(text)
        return Reply.read(code, text), found[1].decode("ascii") if found else ""

    def _reset(self, connection: Dialogue) -> None:
        try:
            code = connection.rset()[0]
        except (OSError, smtplib.SMTPException):
            code = -1
        if code != 250:
            self._drop()  # what was learnt stands; the next message finds no session


def _beyond(connection: Dialogue, recipients: Sequence[str], data: bytes) -> dict[int, Reply]:
    """Recipients for whom this server can't take this message, by what it said of itself; nothing is sent then."""
    limit = str(connection.esmtp_features.get("size", ""))
    if limit.isdecimal() and 0 < int(limit[:18]) < len(data):
        why = f"the mail has {len(data)} bytes, the server takes {int(limit[:18])}"
        return dict.fromkeys(range(len(recipients)), Reply(552, "5.3.4", why))
    if connection.has_extn("smtputf8"):
        return {}
    unicode = Reply(553, "5.6.7", "the address needs SMTPUTF8, which the server doesn't offer")
    return {n: unicode for n, address in enumerate(recipients) if not (address.isascii() and data.isascii())}


def _exchange(connection: Dialogue, commands: Sequence[str]) -> list[Reply]:
    """Commands and their replies; in few writes if the server allows it (RFC 2920)."""
    for command in commands:
        if not command.isprintable():
            raise Permanent("an address of the envelope has a character that can't be sent: correct what writes it")
    at_once = _COMMANDS_AT_ONCE if connection.has_extn("pipelining") else 1
    replies: list[Reply] = []
    for start in range(0, len(commands), at_once):
        group = commands[start : start + at_once]
        connection.send("".join(f"{command}\r\n" for command in group).encode())
        for _ in group:
            replies.append(Reply.read(*connection.getreply()))
            if replies[-1].code == CLOSING:
                raise smtplib.SMTPServerDisconnected
    return replies
