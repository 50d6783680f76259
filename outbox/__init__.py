"""One Postgres transaction for an application's rows and for its effects elsewhere.

An application writes its rows and its *intents* in one transaction; workers drain the intents into a
search index, a blob store and a mail server, each effect once. The life of an intent is told in
`outbox.intent`.

    from outbox import Outbox, Settings

Importing this package loads neither SQLAlchemy nor psycopg until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox.blob import Blob
    from outbox.errors import Ambiguous, OutboxError, Permanent, Transient
    from outbox.intent import Intent
    from outbox.position import Position, Token
    from outbox.saga.definition import Saga
    from outbox.saga.plan import Retry
    from outbox.session import Outbox
    from outbox.settings import Settings

__version__ = "0.1.0"

_HOME = {
    "Ambiguous": "errors",
    "Blob": "blob",
    "Intent": "intent",
    "Outbox": "session",
    "OutboxError": "errors",
    "Permanent": "errors",
    "Position": "position",
    "Retry": "saga.plan",
    "Saga": "saga.definition",
    "Settings": "settings",
    "Token": "position",
    "Transient": "errors",
}

__all__ = [
    "Ambiguous",
    "Blob",
    "Intent",
    "Outbox",
    "OutboxError",
    "Permanent",
    "Position",
    "Retry",
    "Saga",
    "Settings",
    "Token",
    "Transient",
]


def __getattr__(name: str) -> Any:
    # Workers and commands start several times faster without SQLAlchemy, and import only what they use.
    if name in _HOME:
        from importlib import import_module  # noqa: PLC0415 - only on first use of a name

        return getattr(import_module(f"outbox.{_HOME[name]}"), name)
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
