"""A client's side of SMTP: one connection, one message at a time, and exact knowledge of what was sent.

Used by `workers.mail`. SMTP has one point of no return, the dot that ends the message: before its last byte is
handed to the system, a server can't have taken the message; after the reply it is known; in between nobody
knows. `submit` keeps the three apart:

* it returns: every recipient was accepted (durable at the server, by its promise), deferred or refused.
* `Unavailable`: nothing was taken. The server can't be reached, is closing (421), or went before the dot.
* `Ambiguous`: the connection was lost after the dot, before the reply.

After either exception the connection is closed, and stays closed until `connect`: only the caller knows whether
it may still send. Nothing here names an address or quotes a server's text, which does: errors carry codes.
"""

from __future__ import annotations

import re
import select
import smtplib
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from outbox.errors import Ambiguous, NotReady, Permanent, Unavailable

_ENHANCED = re.compile(rb"\b([245]\.\d{1,3}\.\d{1,3})\b")
_QUEUE_ID = re.compile(rb"(?:queued as|\bid=)\s*([A-Za-z0-9.-]{1,64})")
_COMMANDS_AT_ONCE = 100
"""Replies to more than so many pipelined commands could fill both buffers, and both sides would wait."""

CLOSING = 421


class Reply(NamedTuple):
    """A server's answer without its text, which may name addresses."""

    code: int
    #: Enhanced status such as 5.1.1, or "".
    status: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.status}".rstrip()

    @property
    def deferred(self) -> bool:
        """Whether trying again can help."""
        return not 500 <= self.code <= 599


class Submission(NamedTuple):
    """What became of a message, by index of the recipient. All are accepted, or none is."""

    #: The server's name for the message, "" if it told none; None if it didn't take it.
    queue_id: str | None
    #: Recipients that can be tried again, with the reason.
    deferred: dict[int, Reply]
    #: Recipients that can't.
    refused: dict[int, Reply]


Target = str | tuple[str, int]


def smtp_target(url: str) -> Target:
    """`smtp://HOST:PORT` as (host, port), `unix:/path` as the path. Raises `NotReady`."""
    kind, _, path = url.partition(":")
    if kind == "unix" and path.startswith("/"):
        return path
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if kind != "smtp" or not host or (parts.path or parts.query or parts.username) not in ("", None):
        raise NotReady("the mail server's address is not understood: write smtp://HOST:PORT or unix:/path/to/socket")
    return host, 25 if port is None else port


class _Connection(smtplib.SMTP):
    """`smtplib.SMTP` on a socket of either family."""

    def __init__(self, target: Target, name: str, timeout: float) -> None:
        super().__init__(local_hostname=name, timeout=timeout)
        self.sock = _unix_socket(target, timeout) if isinstance(target, str) else _tcp_socket(target, timeout)
        self.file = None


def _unix_socket(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_socket(address: tuple[str, int], timeout: float) -> socket.socket:
    sock = socket.create_connection(address, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class SmtpSession:
    """A connection to one server, kept open between messages."""

    def __init__(self, target: Target, name: str, *, timeout: float = 30.0, reply_timeout: float = 120.0) -> None:
        self.target = target
        #: What EHLO says. The embedded server ends an older session of the same lane by it (`workers.mailserver`).
        self.name = name
        self.timeout = timeout
        #: Seconds to wait for the reply to the dot. Generous, because giving up leaves the message in doubt.
        self.reply_timeout = reply_timeout
        self._connection: _Connection | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a session, as far as is known here."""
        return self._connection is not None and self._connection.sock is not None

    def connect(self) -> None:
        """Have a session: the one there is, unless the server has ended it. Raises `Unavailable`."""
        if self._connection is not None and self._connection.sock is not None:
            # A server that says something unasked says goodbye; one that has gone reads as the end.
            if not select.select([self._connection.sock], [], [], 0)[0]:
                return
            self._drop()
        try:
            connection = self._connection = _Connection(self.target, self.name, self.timeout)
            greeting = _reply(*connection.getreply())
            hello = _reply(*connection.ehlo(self.name)) if greeting.code == 220 else greeting
        except (OSError, smtplib.SMTPException, ValueError) as error:
            self._drop()
            raise Unavailable(
                f"the mail server can't be reached ({type(error).__name__}): start it, or correct OUTBOX_SMTP"
            ) from None
        if not 200 <= hello.code <= 299:
            self._drop()
            raise Unavailable(f"the mail server takes no session now ({hello}): see its log")

    def reconnect(self) -> None:
        """Have a new session. Raises `Unavailable`."""
        self._drop()
        self.connect()

    def close(self) -> None:
        """End the session politely; no error if it is gone."""
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.settimeout(1.0)
            with suppress(OSError, smtplib.SMTPException):
                self._connection.quit()
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def submit(self, sender: str, recipients: Sequence[str], data: bytes) -> Submission:
        """Hand over a message for all of `recipients`, or for none.

        If the server takes only some of them, nothing is sent: the caller decides what to do about the rest,
        and says by the envelope sender for whom the message is. Addresses and `data` (CRLF, ASCII) must have
        been checked; a line break in an address raises `Permanent` all the same.

        Raises `Unavailable` or `Ambiguous`; the connection is closed then.
        """
        connection = self._connection
        if connection is None or connection.sock is None:
            raise Unavailable("there is no session with the mail server: the lane connects again")
        try:
            return self._submit(connection, sender, recipients, data)
        except (OSError, smtplib.SMTPException) as error:
            # Everything after the dot raises Ambiguous itself.
            self._drop()
            raise Unavailable(
                f"the mail server went away before it had the message ({type(error).__name__}): see its log"
            ) from None
        except BaseException:
            self._drop()
            raise

    def _submit(self, connection: _Connection, sender: str, recipients: Sequence[str], data: bytes) -> Submission:
        size = f" SIZE={len(data)}" if connection.has_extn("size") else ""
        mail, *rcpts = _exchange(
            connection, [f"MAIL FROM:<{sender}>{size}", *(f"RCPT TO:<{address}>" for address in recipients)]
        )
        failed = {number: reply for number, reply in enumerate(rcpts) if not 200 <= reply.code <= 299}
        if not 200 <= mail.code <= 299:
            if mail.deferred and mail.status.startswith("4.3."):
                # "Mail system status": full, or not taking mail at all. It's not about this message.
                self._drop()
                raise Unavailable(f"the mail server has no room for mail now ({mail}): see its log")
            failed = dict.fromkeys(range(len(recipients)), mail)
        if not failed:
            data_reply = _exchange(connection, ["DATA"])[0]
            if data_reply.code == 354:
                final = self._send(connection, data)
                if 200 <= final[0].code <= 299:
                    return Submission(final[1], {}, {})
                data_reply = final[0]
            failed = dict.fromkeys(range(len(recipients)), data_reply)
        self._reset(connection)
        return Submission(
            None,
            {number: reply for number, reply in failed.items() if reply.deferred},
            {number: reply for number, reply in failed.items() if not reply.deferred},
        )

    def _send(self, connection: _Connection, data: bytes) -> tuple[Reply, str]:
        """Headers, body and dot in one write: of two small ones the second waits 40 ms (Nagle)."""
        end = b".\r\n" if data.endswith(b"\r\n") else b"\r\n.\r\n"
        sock = connection.sock
        if sock is None:
            raise smtplib.SMTPServerDisconnected
        left = memoryview(re.sub(rb"(?m)^\.", b"..", data) + end)
        while left:
            # Counted by hand: when this raises, the end of the dot was not handed over, and can't arrive.
            left = left[sock.send(left) :]
        sock.settimeout(self.reply_timeout)
        try:
            code, text = connection.getreply()
        except (OSError, smtplib.SMTPException) as error:
            raise Ambiguous(
                f"the mail server went away between the message and its answer ({type(error).__name__})"
            ) from None
        reply = _reply(code, text)
        if not 200 <= reply.code <= 599:
            raise Ambiguous("the mail server's answer to the message is not SMTP")
        sock.settimeout(self.timeout)
        if reply.code == CLOSING:
            raise smtplib.SMTPServerDisconnected
        found = _QUEUE_ID.search(text)
        return reply, found[1].decode("ascii") if found else ""

    def _reset(self, connection: _Connection) -> None:
        try:
            code = connection.rset()[0]
        except (OSError, smtplib.SMTPException):
            code = -1
        if code != 250:
            self._drop()  # what was learnt stands; the next message finds no session


def _reply(code: int, text: bytes) -> Reply:
    status = _ENHANCED.search(text)
    return Reply(code, status[1].decode("ascii") if status else "")


def _exchange(connection: _Connection, commands: Sequence[str]) -> list[Reply]:
    """Commands and their replies; in few writes if the server allows it (RFC 2920)."""
    for command in commands:
        if not command.isascii() or not command.isprintable():
            raise Permanent("an address of the envelope has a character that can't be sent: correct what writes it")
    at_once = _COMMANDS_AT_ONCE if connection.has_extn("pipelining") else 1
    replies: list[Reply] = []
    for start in range(0, len(commands), at_once):
        group = commands[start : start + at_once]
        connection.send("".join(f"{command}\r\n" for command in group))
        for _ in group:
            replies.append(_reply(*connection.getreply()))
            if replies[-1].code == CLOSING or not 200 <= replies[-1].code <= 599:
                raise smtplib.SMTPServerDisconnected
    return replies
