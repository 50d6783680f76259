"""The address: the broker that messages are relayed to.

    amqp://USER:PASSWORD@HOST:PORT/VHOST     RabbitMQ; amqps:// with TLS
    redis://USER:PASSWORD@HOST:PORT/DB       Redis; rediss:// with TLS, unix:///path/to/socket

It is read from OUTBOX_RELAY, or from `--to` if there is no password in it: everybody on the machine can read a command
line. With TLS the broker's certificate is checked against its name, always. Nothing of an address is ever printed.

Raises `NotReady` for one that can't be used.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from outbox.errors import NotReady
from outbox.settings import Settings
from workers.relay import is_loopback

Kind = Literal["rabbitmq", "redis"]

#: scheme → the broker, and whether with TLS.
_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "amqp": ("rabbitmq", False),
    "amqps": ("rabbitmq", True),
    "redis": ("redis", False),
    "rediss": ("redis", True),
    "unix": ("redis", False),
}


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """Where a broker is, and how to be let in."""

    kind: Kind
    url: str
    tls: bool = False
    #: Certificates of a private authority, to be trusted instead of the system's.
    ca_file: Path | None = None

    @classmethod
    def of(cls, settings: Settings, to: str | None = None) -> Address:
        """The broker that `--to` names, or OUTBOX_RELAY."""
        if to is not None and _parts(to, "--to").password is not None:
            raise NotReady("--to has a password in it, and everybody can read command lines: set OUTBOX_RELAY instead")
        if to is None and settings.relay is None:
            raise NotReady("there is nowhere to relay to: name the broker, with --to amqp://HOST or in OUTBOX_RELAY")
        return cls.read(to or settings.relay or "", ca_file=settings.relay_ca_file)

    @classmethod
    def read(cls, url: str, *, ca_file: Path | None = None) -> Address:
        """The broker of a URL."""
        parts = _parts(url, "the broker's address")
        kind, tls = _SCHEMES[parts.scheme]
        if (parts.username is None) != (parts.password is None) and kind == "rabbitmq":
            raise NotReady("RabbitMQ wants a user with a password: write amqp://USER:PASSWORD@HOST in OUTBOX_RELAY")
        address = cls(kind, url, tls, ca_file)
        if tls:
            address.context()
        return address

    @property
    def host(self) -> str:
        """The name that the broker's certificate must be for."""
        return urlsplit(self.url).hostname or "localhost"

    @property
    def in_the_clear(self) -> bool:
        """Whether messages and a password leave this machine without TLS."""
        return not (self.tls or is_loopback(self.host))

    def context(self) -> ssl.SSLContext:
        """What TLS is made with: names and certificates are checked."""
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError):
            raise NotReady("OUTBOX_RELAY_CA_FILE is no file of PEM certificates that can be read: correct it") from None


def _parts(url: str, what: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme not in _SCHEMES or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise NotReady(
            f"{what} is not understood: write amqp://USER:PASSWORD@HOST/VHOST or redis://HOST:PORT/DB, "
            "or amqps:// and rediss:// with TLS"
        )
    return parts
