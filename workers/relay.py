"""The relay: the mail server that mail is handed to, as the setting OUTBOX_SMTP names it.

    smtp://HOST:PORT               as it is; for loopback and networks of one's own
    smtp+starttls://USER@HOST:PORT TLS before anything else is said; a server without it is not used
    smtps://USER@HOST:PORT         TLS from the first byte
    unix:/path/to/socket

With TLS the server's certificate is checked against its name, always. The password is in a file and is read
anew for each session, so that it can be changed while workers run; it is in no URL, no log and no error. It is
never sent in the clear, except on loopback.

Called by `workers.mail`, `workers.smtp` and by servers that listen (`smtp_target`). Errors: `NotReady` for a
setting that can't be used, `Unavailable` for a file that can't be read just now.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from outbox.errors import NotReady, Unavailable
from outbox.settings import Settings

Target = str | tuple[str, int]
"""Where a server listens: the path of a socket, or host and port."""

Security = Literal["none", "starttls", "tls"]

#: scheme → what protects the session, and the port if none is named.
_SCHEMES: dict[str, tuple[Security, int]] = {
    "smtp": ("none", 25), "smtp+starttls": ("starttls", 587), "smtps": ("tls", 465)
}  # fmt: skip

_UNDERSTOOD = (
    "the mail server's address is not understood: "
    "write smtp://HOST:PORT, smtp+starttls://HOST:PORT, smtps://HOST:PORT or unix:/path/to/socket"
)


@dataclass(frozen=True, slots=True)
class Relay:
    """A mail server, and how to be let in."""

    target: Target
    security: Security = "none"
    #: Who to be there (AUTH), or None.
    user: str | None = None
    password_file: Path | None = None
    #: Certificates of a private authority, to be trusted instead of the system's.
    ca_file: Path | None = None

    @classmethod
    def read(cls, url: str, *, password_file: Path | None = None, ca_file: Path | None = None) -> Relay:
        """The relay of the setting OUTBOX_SMTP. Raises `NotReady`, which quotes nothing of the URL."""
        if url.startswith("unix:"):
            return cls(smtp_target(url))
        parts, port = _split(url)
        security, usual = _SCHEMES[parts.scheme]
        user = unquote(parts.username) if parts.username else None
        host = parts.hostname or ""
        if parts.password is not None:
            raise NotReady(
                "OUTBOX_SMTP has a password in it: put it into a file and name that OUTBOX_SMTP_PASSWORD_FILE"
            )
        if (user is None) != (password_file is None):
            raise NotReady(
                "to log in, the mail server needs a user in OUTBOX_SMTP (smtps://USER@HOST) and the file "
                "OUTBOX_SMTP_PASSWORD_FILE: set both or neither"
            )
        if user is not None and security == "none" and not is_loopback(host):
            raise NotReady("OUTBOX_SMTP would send a password in the clear: use smtp+starttls:// or smtps://")
        relay = cls((host, usual if port is None else port), security, user, password_file, ca_file)
        if ca_file is not None:
            relay.context()
        return relay

    @classmethod
    def of(cls, settings: Settings) -> Relay:
        """The relay that these settings name. Raises `NotReady`."""
        return cls.read(settings.smtp, password_file=settings.smtp_password_file, ca_file=settings.smtp_ca_file)

    @property
    def host(self) -> str:
        """The name that the server's certificate must be for."""
        return "localhost" if isinstance(self.target, str) else self.target[0]

    def context(self) -> ssl.SSLContext:
        """What TLS is made with: names and certificates are checked. Raises `NotReady`."""
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError):
            raise NotReady("OUTBOX_SMTP_CA_FILE is no file of PEM certificates that can be read: correct it") from None

    def password(self) -> str:
        """The password as it is now, without the end of its line. Raises `Unavailable`."""
        try:
            text = self.password_file.read_text(encoding="ascii") if self.password_file else ""
        except (OSError, UnicodeError) as error:
            raise Unavailable(
                f"OUTBOX_SMTP_PASSWORD_FILE can't be read ({type(error).__name__}): "
                "let this user read it, and write the password in ASCII on one line"
            ) from None
        return text.rstrip("\r\n")


def smtp_target(url: str) -> Target:
    """`smtp://HOST:PORT` as (host, port), `unix:/path` as the path. Raises `NotReady`."""
    kind, _, path = url.partition(":")
    if kind == "unix" and path.startswith("/"):
        return path
    parts, port = _split(url)
    if parts.scheme != "smtp" or parts.username is not None:
        raise NotReady(_UNDERSTOOD)
    return parts.hostname or "", 25 if port is None else port


def lmtp_target(url: str) -> Target:
    """`lmtp://HOST:PORT` or `unix:/path`, as `smtp_target`. Raises `NotReady`."""
    try:
        return smtp_target(re.sub(r"^lmtp(?=://[^/@]*:\d+$)", "smtp", url) if not url.startswith("smtp") else "")
    except NotReady:
        raise NotReady("OUTBOX_LMTP is not understood: write lmtp://127.0.0.1:PORT or unix:/path/to/socket") from None


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise NotReady(_UNDERSTOOD) from None
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.path or parts.query or parts.fragment:
        raise NotReady(_UNDERSTOOD)
    return parts, port


def is_loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
