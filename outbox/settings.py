"""Settings: where the participants are.

Each setting comes from its environment variable, or else from the state directory that `outbox up` made
(`.outbox/` by default, `OUTBOX_STATE` or `--state` name another). So a program runs against the embedded
stack with no configuration, and one variable replaces each part by the real server.

    OUTBOX_DATABASE       postgresql://…  (what the process connects as: the application's or the worker's user)
    OUTBOX_INDEX          directory of the Xapian index
    OUTBOX_BLOBS          directory of the blob store, or s3://BUCKET/PREFIX
    OUTBOX_S3_ENDPOINT    http(s)://HOST:PORT of an S3 server that is not Amazon's
    OUTBOX_BLOB_INLINE    bytes of a blob that travels in its intent; larger ones are staged
    OUTBOX_SMTP           smtp://HOST:PORT, smtp+starttls://USER@HOST, smtps://USER@HOST or unix:/path/to/socket
    OUTBOX_SMTP_PASSWORD_FILE  file with the password of the user in OUTBOX_SMTP
    OUTBOX_SMTP_CA_FILE   certificates to trust instead of the system's
    OUTBOX_MAIL_EVIDENCE  maildir:/path, postfix:/etc/postfix, receipt:receipt@example.org, hold:/etc/postfix, or none:
                          how an attempt in doubt is decided
    OUTBOX_LMTP           lmtp://127.0.0.1:PORT or unix:/path: where `outbox work receipts` listens
    OUTBOX_POSTSUPER      the command postsuper, as this user may run it; for hold: only
    OUTBOX_MAIL_DOMAIN    domain of Message-IDs and envelope senders
    OUTBOX_RETENTION      how old a partition of the log gets before it goes, such as 30d; not set: nothing is dropped
    OUTBOX_ARCHIVE        directory or s3://BUCKET/PREFIX where it is archived first, or none
    OUTBOX_TTL            seconds of a lane's lease
    OUTBOX_SAGAS          modules that define sagas: package.module[,…]
    OUTBOX_SCRUB_EVERY    how often `outbox scrub --scheduled` scrubs each participant, such as 7d
    OUTBOX_SCRUB_RATE     bytes of blobs, or else items, that such a scrub looks at in a second
    OUTBOX_SAGA_DATABASE  what the saga engine connects as, if not as the other workers
    OUTBOX_ACTORS         modules that declare actors of dramatiq: package.module[,…]
    OUTBOX_ACTOR_DATABASE what the workers of actors connect as, if not as the other workers
    OUTBOX_RELAY          amqp(s)://… or redis(s)://…: dramatiq's broker that queues are relayed to
    OUTBOX_RELAY_QUEUES   the queues that are relayed: name[,…]; not set: those that are already
    OUTBOX_RELAY_CA_FILE  certificates to trust instead of the system's, for amqps and rediss
    OUTBOX_RELAY_MAX_PRIORITY  max_priority of RabbitMQ's queues that the relay makes, as its workers have it
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from outbox import span
from outbox.errors import NotReady, StateVersion
from outbox.span import parse

STATE_FORMAT = 1
"""Layout of the state directory. A directory of another format is refused, never converted in silence."""

STATE_FILE = "state.json"

INLINE_MOST = 45_000
"""Bytes that a payload of 64 KiB holds as base64, with room for a blob's name and type."""

RETENTION_LEAST = 3600.0
"""Seconds: ticks of the last hour are all kept, and restarts and retries fall into it."""

NO_ARCHIVE = "none"
"""As the archive's place: dropped without one."""

Role = Literal["app", "worker", "operator", "saga", "actor", "admin"]

Place = TypeVar("Place", bound=Path | str)

#: Who connects to the embedded Postgres as what.
_EMBEDDED_USER: dict[Role, str] = {
    "app": "app",
    "worker": "outbox_worker",
    "operator": "outbox_operator",
    "saga": "saga",
    "actor": "actor",
    "admin": "postgres",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where everything is. Made by `load`, or by hand."""

    #: libpq connection URI.
    database: str
    #: Directory of the Xapian index; None if nothing says where it is.
    index: Path | None
    #: Directory of the blob store, or `s3://BUCKET/PREFIX`; None if nothing says where it is.
    blobs: Path | str | None
    #: `smtp://HOST:PORT`, with TLS and a user as in `workers.relay`, or `unix:/path`.
    smtp: str
    #: File with the password of the user in `smtp`.
    smtp_password_file: Path | None = None
    #: File of PEM certificates to trust instead of the system's.
    smtp_ca_file: Path | None = None
    #: `maildir:/path`, `postfix:/etc/postfix`, `receipt:receipt@example.org`, `hold:/etc/postfix` or `none`.
    mail_evidence: str = "none"
    #: Where the server for receipts listens: `lmtp://127.0.0.1:PORT` or `unix:/path`.
    lmtp: str = "lmtp://127.0.0.1:2424"
    #: How `postsuper` is run, such as `sudo -n /usr/sbin/postsuper`.
    postsuper: str = "postsuper"
    #: Right-hand side of Message-IDs and envelope senders.
    mail_domain: str = "outbox.invalid"
    #: Seconds of a lane's lease.
    ttl: float = 15.0
    #: `http(s)://HOST:PORT` of the S3 server; None: Amazon's, or what boto3's own configuration says.
    s3_endpoint: str | None = None
    #: Bytes of the largest blob that travels in its intent; 0: none does.
    blob_inline: int = 0
    #: Modules that define sagas.
    sagas: tuple[str, ...] = ()
    #: Seconds after which the log's partitions are dropped; None: never.
    retention: float | None = None
    #: Directory or `s3://BUCKET/PREFIX` of their archives, or `none`; None if nothing says where.
    archive: Path | str | None = None
    #: Seconds between two scheduled scrubs of a participant; None: there is no schedule.
    scrub_every: float | None = None
    #: Bytes of blobs, or else items, that a scheduled scrub looks at in a second; None: as fast as it can.
    scrub_rate: float | None = None
    #: The state directory, where workers note what they have seen of the log; None if nothing names one.
    state: Path | None = None
    #: Modules that declare actors.
    actors: tuple[str, ...] = ()
    #: The broker that queues are relayed to; None: none are.
    relay: str | None = field(default=None, repr=False)
    #: The queues that are relayed; empty: those that are already.
    relay_queues: tuple[str, ...] = ()
    #: File of PEM certificates to trust instead of the system's, for the broker.
    relay_ca_file: Path | None = None
    #: `max_priority` of queues that the relay makes in RabbitMQ; None: they have no priorities.
    relay_max_priority: int | None = None

    @property
    def sqlalchemy_url(self) -> str:
        """`database` for `sqlalchemy.create_engine`."""
        return "postgresql+psycopg://" + self.database.split("://", 1)[1]

    @classmethod
    def load(
        cls, state: str | Path | None = None, *, role: Role = "app", env: Mapping[str, str] | None = None
    ) -> Settings:
        """Settings from the environment, and for what it doesn't name from the state directory.

        Raises `NotReady` when neither says where the database is, `StateVersion` for a state directory of
        another version.
        """
        env = os.environ if env is None else env
        directory = Path(state or env.get("OUTBOX_STATE") or ".outbox").absolute()
        embedded: dict[str, Any] = {}
        # The database named in the environment needs no state directory; anything else may lie there.
        if not env.get("OUTBOX_DATABASE") or (directory / STATE_FILE).exists():
            embedded = read_state(directory)
        named = env.get("OUTBOX_DATABASE")
        if role in ("saga", "actor"):
            named = env.get(f"OUTBOX_{role.upper()}_DATABASE") or named
        database = named or _embedded_database(embedded, role)
        if "://" not in database:
            raise NotReady("OUTBOX_DATABASE is not a URL: write it like postgresql://user@host/database")
        return cls(
            database=database,
            state=directory if embedded or state or env.get("OUTBOX_STATE") else None,
            index=_path(env.get("OUTBOX_INDEX")) or (directory / "index" if embedded else None),
            blobs=_place(env.get("OUTBOX_BLOBS")) or (directory / "blobs" if embedded else None),
            smtp=env.get("OUTBOX_SMTP") or embedded.get("smtp") or "smtp://127.0.0.1:25",
            smtp_password_file=_path(env.get("OUTBOX_SMTP_PASSWORD_FILE")),
            smtp_ca_file=_path(env.get("OUTBOX_SMTP_CA_FILE")),
            lmtp=env.get("OUTBOX_LMTP") or "lmtp://127.0.0.1:2424",
            mail_evidence=env.get("OUTBOX_MAIL_EVIDENCE")
            or (f"maildir:{directory / 'mail'}" if embedded and not env.get("OUTBOX_SMTP") else "none"),
            postsuper=env.get("OUTBOX_POSTSUPER") or "postsuper",
            mail_domain=env.get("OUTBOX_MAIL_DOMAIN") or "outbox.invalid",
            ttl=_seconds(env.get("OUTBOX_TTL") or "15"),
            s3_endpoint=env.get("OUTBOX_S3_ENDPOINT") or None,
            blob_inline=_inline(env.get("OUTBOX_BLOB_INLINE") or "0"),
            retention=_retention(env.get("OUTBOX_RETENTION")),
            archive=archive_place(env.get("OUTBOX_ARCHIVE")) or (directory / "archive" if embedded else None),
            sagas=_modules(env.get("OUTBOX_SAGAS", "")),
            scrub_every=_every(env.get("OUTBOX_SCRUB_EVERY") or ""),
            scrub_rate=_rate(env.get("OUTBOX_SCRUB_RATE") or ""),
            actors=_modules(env.get("OUTBOX_ACTORS", "")),
            relay=env.get("OUTBOX_RELAY") or None,
            relay_queues=_modules(env.get("OUTBOX_RELAY_QUEUES", "")),
            relay_ca_file=_path(env.get("OUTBOX_RELAY_CA_FILE")),
            relay_max_priority=_max_priority(env.get("OUTBOX_RELAY_MAX_PRIORITY") or ""),
        )


def required(path: Place | None, variable: str) -> Place:
    """`path`, or `NotReady` with the variable to set: a directory is never invented beside a named database."""
    if path is None:
        raise NotReady(f"{variable} is not set, and there is no state directory: say where it is")
    return path


def _modules(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def is_bucket(place: Path | str) -> bool:
    """Whether it is the URL of a bucket, and not a directory."""
    return isinstance(place, str) and place.startswith("s3:")


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _place(text: str | None) -> Path | str | None:
    return text if text and is_bucket(text) else _path(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 3600.0:
        raise NotReady(f"OUTBOX_TTL={text!r} is not a number of seconds between 1 and 3600: correct it")
    return value


def _retention(text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = span.parse(text)
    except ValueError:
        value = 0.0
    if value < RETENTION_LEAST:
        raise NotReady(f"OUTBOX_RETENTION={text!r} is not a span of time of an hour or more, such as 30d: correct it")
    return value


def archive_place(text: str | None) -> Path | str | None:
    """Where archives go, as OUTBOX_ARCHIVE and `--archive` say it."""
    return text if text == NO_ARCHIVE else _place(text)


def _inline(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > INLINE_MOST:
        raise NotReady(f"OUTBOX_BLOB_INLINE={text!r} is not a number of bytes up to {INLINE_MOST:,}: correct it")
    return int(text)


def _max_priority(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 255:
        raise NotReady(f"OUTBOX_RELAY_MAX_PRIORITY={text!r} is not a number from 1 to 255: correct it")
    return int(text)


def _every(text: str) -> float | None:
    if not text:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise NotReady(f"OUTBOX_SCRUB_EVERY: {error}") from None


def _rate(text: str) -> float | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise NotReady(f"OUTBOX_SCRUB_RATE={text!r} is not a whole number a second, such as 20000000: correct it")
    return float(text)


def _embedded_database(state: dict[str, Any], role: Role) -> str:
    return f"postgresql://{_EMBEDDED_USER[role]}@/{state['database']}?host={state['sockets']}&port=5432"


def read_state(directory: Path) -> dict[str, Any]:
    """What `outbox up` noted in the state directory: format, database, sockets (a directory), smtp."""
    file = directory / STATE_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotReady(
            f"there is no database to use: {directory} is not a state directory and OUTBOX_DATABASE is not set. "
            "Run `outbox up`, or set OUTBOX_DATABASE"
        ) from None
    except (OSError, ValueError) as error:
        why = type(error).__name__
        raise NotReady(f"{file} can't be read ({why}): restore it, or start with another --state") from None
    if not isinstance(found, dict) or found.get("format") != STATE_FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise StateVersion(
            f"{directory} has the state format {version!r} and this version of outbox reads {STATE_FORMAT}: "
            "use the version that made it, or start with another --state"
        )
    return found
