"""The dialogue: commands and replies on one connection to a mail server that need not mean well.

Used by `workers.smtp`; `smtplib` makes the commands. What is added to it:

* A reply is complete within its time and its size, or the dialogue is over: one that drips, or never ends, holds
  nobody up and fills no memory.
* A reply counts only when it comes after its question. What a server says unasked, or too early, ends the dialogue:
  it could be taken for the answer to a later command. The same keeps out what is slipped in before TLS begins
  (CVE-2011-0411).
* A reply is SMTP: three digits from 200 to 599, the same in each of its lines.

Raises `Garbled` for any of these, `smtplib`'s exceptions and `OSError` for a connection that is gone.
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import time
from contextlib import suppress
from typing import Any, NamedTuple

from workers.relay import Relay, is_loopback

REPLY_LIMIT = 64 * 1024
"""Bytes of a reply, all its lines together. Real ones have a hundred or two."""

_ENHANCED = re.compile(rb"\b([245]\.\d{1,3}\.\d{1,3})\b")
_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])(.*))?", re.DOTALL)


class Reply(NamedTuple):
    """A server's answer without its text, which may name addresses."""

    code: int
    #: Enhanced status such as 5.1.1, or "".
    status: str = ""
    #: Why, in our own words, when it is our own answer in the server's stead.
    why: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.status}".rstrip() + (f": {self.why}" if self.why else "")

    @classmethod
    def read(cls, code: int, text: bytes) -> Reply:
        """From what `Dialogue.getreply` returns."""
        status = _ENHANCED.search(text)
        return cls(code, status[1].decode("ascii") if status else "")

    @property
    def good(self) -> bool:
        """Whether the server says yes."""
        return 200 <= self.code <= 299

    @property
    def deferred(self) -> bool:
        """Whether trying again can help."""
        return not 500 <= self.code <= 599


class Garbled(smtplib.SMTPException):
    """What the server says is no answer to what it was asked."""


class Dialogue(smtplib.SMTP):
    """A connection. `patience` is how many seconds a whole reply may take."""

    def __init__(self, relay: Relay, name: str, timeout: float) -> None:
        super().__init__(local_hostname=name, timeout=timeout)
        self.patience = timeout
        self._unread = bytearray()
        self._relay = relay
        self._host = relay.host
        self.sock: socket.socket | None = _connect(relay, timeout)
        try:
            if relay.security == "tls":
                self._secure(relay)
        except BaseException:
            self.close()
            raise

    def begin_tls(self) -> bool:
        """STARTTLS, unless the server has no such thing. EHLO comes next, and forgets what was said in the clear; if
        anything was slipped in behind the reply, `send` finds it and ends the dialogue."""
        if not self.has_extn("starttls") or self.docmd("STARTTLS")[0] != 220:
            return False
        self._secure(self._relay)
        return True

    def _secure(self, relay: Relay) -> None:
        if self.sock is not None:
            self.sock = relay.context().wrap_socket(self.sock, server_hostname=relay.host)

    def private(self) -> bool:
        """Whether nobody else can read along."""
        if self.sock is None or isinstance(self.sock, ssl.SSLSocket) or self.sock.family == socket.AF_UNIX:
            return self.sock is not None
        return is_loopback(self.sock.getpeername()[0])

    def quiet(self) -> bool:
        """Whether the server is there and has said nothing unasked. A goodbye is unasked, and so is an end."""
        if self._unread or self.sock is None:
            return False
        before = self.sock.gettimeout()
        try:
            # Not select: a TLS connection has traffic of its own.
            self.sock.settimeout(0)
            self._unread += self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        finally:
            with suppress(OSError):
                self.sock.settimeout(before)
        return False

    def send(self, s: Any) -> None:
        """As smtplib's, for all its commands; but never into what the server is saying already."""
        if not self.quiet():
            self.close()
            raise Garbled
        super().send(s)

    def getreply(self) -> tuple[int, bytes]:
        """The next reply: its code, and its text without the codes."""
        deadline, size, lines = time.monotonic() + self.patience, 0, list[bytes]()
        code = b""
        while True:
            line = self._line(deadline, REPLY_LIMIT - size)
            size += len(line)
            match = _LINE.fullmatch(line.rstrip(b"\r\n"))
            if match is None or match[1] != (code or match[1]):
                self.close()
                raise Garbled
            code = match[1]
            lines.append((match[3] or b"").strip())
            if match[2] != b"-":
                return int(code), b"\n".join(lines)

    def _line(self, deadline: float, limit: int) -> bytes:
        sock, searched = self.sock, 0
        while sock is not None:
            end = self._unread.find(b"\n", searched) + 1
            if (end or len(self._unread)) > limit:
                self.close()
                raise Garbled
            if end:
                line = bytes(self._unread[:end])
                del self._unread[:end]
                return line
            searched = len(self._unread)
            # A server that sends a byte now and then gets no more time for it.
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(8192)
            sock.settimeout(self.timeout)
            if not data:
                break
            self._unread += data
        self.close()
        raise smtplib.SMTPServerDisconnected


def _connect(relay: Relay, timeout: float) -> socket.socket:
    if not isinstance(relay.target, str):
        sock = socket.create_connection(relay.target, timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(relay.target)
    except BaseException:
        sock.close()
        raise
    return sock
