"""Decisions: what operators see of parked intents, and what they may do with them.

Called by the command line; works while workers run. Reading needs the rights of `outbox_reader`, deciding those of
`outbox_operator`. When `decide` returns, what was done is durable, together with its row in `outbox.audit`.

Whether a decision or a worker's try comes first is decided by the database (alembic/versions/0002_operators.sql):
a decision is what the worker finds, or it is refused because a try is under way. It never waits.

Errors: `NotReady` when the database's user lacks the rights.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg.rows import dict_row

from outbox import sql
from outbox.errors import NotReady

Action = Literal["retry", "skip", "applied", "not_applied"]

ACTS_ON: dict[Action, tuple[str, ...]] = {
    "retry": ("retry", "poison"),
    "skip": ("retry", "poison", "blocked"),
    "applied": ("in_doubt",),
    "not_applied": ("in_doubt",),
}
"""What a decision means by default when no intent is named and no reason given. A scheduled intent must be meant."""

LISTED = ("retry", "poison", "in_doubt", "blocked", "due")
"""The reasons that are listed by default: what was skipped is done with."""

CHUNK = 500
"""Intents in one transaction: none holds rows for long."""

NOTE_LIMIT = 1000
"""Characters of a note."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which parked intents are meant: those for which everything that is given is true."""

    ids: Sequence[int] | None = None
    target: str | None = None
    reasons: Sequence[str] | None = None
    key: str | None = None
    key_prefix: str | None = None
    #: Seconds since it was parked, at least.
    older_than: float | None = None
    #: Part of its error, in upper or lower case.
    error: str | None = None


class Decided(NamedTuple):
    """What became of a decision about one intent."""

    id: int
    target: str | None
    #: What it was parked for, before.
    reason: str | None
    #: Why nothing was done; None: it was done.
    refused: str | None


def find(conn: psycopg.Connection[Any], choice: Choice, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The chosen intents in order of id, at most `limit`: id, target, action, key, reason, attempts, deaths, trying
    (now), retry_at, retry_seconds (from now), parked_at, parked_seconds (ago), error.
    """
    parameters = {name: list(v) if isinstance(v, list | tuple) else v for name, v in asdict(choice).items()}
    try:
        with conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(sql.load("decision_find"), {**parameters, "limit": limit}).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        raise _not_allowed(conn, "see what is parked", "outbox_reader or outbox_operator") from None


def decide(conn: psycopg.Connection[Any], action: Action, ids: Sequence[int], *, note: str = "") -> list[Decided]:
    """Decide about the intents `ids`, in one transaction. → what became of each, in order of id."""
    parameters = {"action": action, "ids": list(ids), "note": note, "client": client()}
    try:
        return [Decided(*row) for row in conn.execute(sql.load("decision_decide"), parameters)]
    except psycopg.errors.InsufficientPrivilege:
        raise _not_allowed(conn, "decide about parked intents", "outbox_operator") from None


def client() -> str:
    """Who runs this process, and where, for the audit trail: said, not proven."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        user = "?"
    return f"{user}@{socket.gethostname()}"[:200]


def _not_allowed(conn: psycopg.Connection[Any], what: str, roles: str) -> NotReady:
    user = conn.info.user
    role = roles.rsplit(maxsplit=1)[-1]
    return NotReady(f"the database user {user} may not {what}: use a member of {roles} (GRANT {role} TO {user})")
