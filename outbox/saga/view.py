"""Sagas as people see them: lists, one saga with its timeline, what is open, and what operators ask for.

Called by `outbox saga`. Reads need the rights of `outbox_reader`, requests those of `outbox_operator`. A request is an
intent: durable when `ask` returns, and decided by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from outbox import sql
from outbox.errors import NotReady, SagaRefused
from outbox.saga.definition import Saga
from outbox.saga.plan import ANY
from outbox.saga.registry import Definitions
from outbox.saga.states import ENDED

Request = Literal["cancel", "retry", "skip", "resolve"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A filter of sagas; all that is given must fit."""

    name: str | None = None
    key: str | None = None
    states: Sequence[str] | None = None
    #: Only those that have not ended.
    open: bool = False
    #: Seconds since the start, at least.
    older: float | None = None


class Shown(NamedTuple):
    """One saga; every value is JSON or a time."""

    saga: dict[str, Any]
    #: In the order of the definition.
    steps: list[dict[str, Any]]
    #: What happened beyond the plain way: at, step, what, detail, who.
    events: list[dict[str, Any]]


def find(conn: psycopg.Connection[Any], choice: Choice, *, limit: int | None) -> list[dict[str, Any]]:
    """The newest sagas that fit, `limit` at most (None: all)."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            sql.load("saga_find"),
            {
                "name": choice.name,
                "key": choice.key,
                "states": None if choice.states is None else list(choice.states),
                # So that the index of open sagas is enough, however many have ended.
                "open": choice.open or bool(choice.states and ENDED.isdisjoint(choice.states)),
                "older": choice.older,
                "limit": limit,
            },
        ).fetchall()


def stuck(
    conn: psycopg.Connection[Any], choice: Choice, *, saga: UUID | None, step: str | None, limit: int | None
) -> list[tuple[UUID, str]]:
    """The stuck steps of open sagas that fit `choice` (but for its states): of one saga, of one name, or all."""
    rows = conn.execute(
        sql.load("saga_find_stuck"),
        {"id": saga, "name": choice.name, "key": choice.key, "older": choice.older, "step": step, "limit": limit},
    )
    return [(row[0], row[1]) for row in rows]


def show(conn: psycopg.Connection[Any], saga: UUID) -> Shown:
    """Everything that is known of a saga. Raises `NotReady` if there is none of this id."""
    with conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(sql.load("saga_show"), {"id": saga}).fetchone()
        if found is None:
            raise NotReady(
                f"there is no saga {saga}: it was never started, or its start is parked or not read yet; "
                "see `outbox saga list` and `outbox status`"
            )
        return Shown(
            found,
            cursor.execute(sql.load("saga_show_steps"), {"id": saga}).fetchall(),
            cursor.execute(sql.load("saga_show_events"), {"id": saga}).fetchall(),
        )


def ask(
    conn: psycopg.Connection[Any],
    saga: UUID,
    request: Request,
    *,
    step: str | None = None,
    happened: bool | None = None,
    note: str = "",
) -> int:
    """Ask the engine for something. → the id of the intent. Raises `NotReady` for a saga or step that isn't there."""
    try:
        row = conn.execute(
            sql.load("saga_ask"),
            {"saga": saga, "action": request, "step": step, "happened": happened, "note": note},
        ).fetchone()
    except psycopg.errors.RaiseException as error:
        raise NotReady(f"{error.diag.message_primary}: {error.diag.message_hint}") from None
    except psycopg.Error as error:
        if error.sqlstate == "OB003":
            raise NotReady(f"{error.diag.message_primary}: {error.diag.message_hint}") from None
        raise
    assert row is not None  # noqa: S101 - a function returns a row
    return int(row[0])


def uncontinued(conn: psycopg.Connection[Any], definitions: Definitions) -> list[dict[str, Any]]:
    """Open sagas, by definition, that `definitions` can't continue, each with why."""
    with conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(sql.load("saga_open")).fetchall()
    lacking = []
    for row in found:
        definition = definitions.get((row["name"], row["version"]))
        if definition is None:
            lacking.append({**row, "why": "not deployed"})
        elif definition.plan.shape != row["shape"]:
            lacking.append({**row, "why": "its steps or its input differ: give the new ones a version of their own"})
        elif definition.plan.form != ANY and (unread := _unread(conn, definition, row)):
            lacking.append(unread)
    return lacking


def _unread(conn: psycopg.Connection[Any], definition: Saga[Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """Open sagas of a definition whose input it can't read: of a field with a default, or an enum, the shape knows
    nothing."""
    why, since = "", []
    with conn.transaction(), conn.cursor(name="outbox_saga_inputs") as cursor:
        for data, started in cursor.execute(sql.load("saga_open_input"), row):
            try:
                definition.read(data)
            except SagaRefused as error:
                why = str(error)
                since.append(started)
    return {**row, "sagas": len(since), "oldest": min(since), "why": why} if since else None
