"""An operation: long work on the log that an operator started, which can be taken up again after a kill.

A replay, a scrub and a resilver are operations. Each is a row of `outbox.operation` that says what was asked for, by
whom, how far it got and what came of it. One process at a time is at it, by a lease with an epoch, like the owner of
a lane: it writes its progress with `save`, in the transaction of the work itself where there is one, so that what was
done is not done again. A process that was killed leaves its operation `running`; `resume` takes it up where it stands.

Everything written here is durable when the call returns, or with the transaction it was called in.

Errors: `NotReady` when an operation can't be resumed, with the reason; `Fenced` when somebody else has resumed ours.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from outbox import follower, sql
from outbox.decision import client
from outbox.errors import Fenced, NotReady
from outbox.lane import is_gone, owner_of, place

TTL = 30.0
"""Seconds of the lease: `save` is called more often than that. A dead owner on this machine isn't waited for."""

State = Literal["running", "done", "failed", "abandoned"]
"""`running` also when nobody is at it: it can be resumed."""


@dataclass(slots=True)
class Operation:
    """An operation that this process is at."""

    id: int
    epoch: int
    kind: str
    #: What was asked for. JSON, without payloads.
    request: dict[str, Any]
    #: Where to go on. JSON; its form is the kind's own.
    progress: dict[str, Any]

    def save(self, conn: psycopg.Connection[Any], progress: dict[str, Any]) -> None:
        """Write down how far it got, and keep the lease. Call it in the transaction of the work. Raises `Fenced`."""
        parameters = {"id": self.id, "epoch": self.epoch, "progress": Jsonb(progress), "ttl": TTL}
        self._must(conn.execute(sql.load("operation_save"), parameters).fetchone())
        self.progress = progress

    @property
    def follower(self) -> str:
        """The name under which it holds the log back."""
        return f"{self.kind}:{self.id}"

    def hold(self, conn: psycopg.Connection[Any], tick: int, note: str) -> None:
        """Have retention keep what `tick` doesn't show, until it has ended, was given up, or holds a later tick.

        Resumed, it goes on holding what it held. Raises `NotReady` for a tick before the horizon.
        """
        if all(each.name != self.follower for each in follower.find(conn)):
            follower.register(conn, self.follower, tick, note=note)

    def end(
        self,
        conn: psycopg.Connection[Any],
        state: State = "done",
        *,
        result: dict[str, Any] | None = None,
        error: str = "",
    ) -> None:
        """End it, and let go of the log; or, as `running`, leave it for somebody to resume. Raises `Fenced`."""
        parameters = {
            "id": self.id,
            "epoch": self.epoch,
            "state": state,
            "error": error,
            "result": None if result is None else Jsonb(result),
        }
        self._must(conn.execute(sql.load("operation_end"), parameters).fetchone())

    def _must(self, row: object | None) -> None:
        if row is None:
            raise Fenced(f"somebody else has resumed {self.kind} {self.id}: this one stops")


def begin(
    conn: psycopg.Connection[Any], kind: str, request: dict[str, Any], progress: dict[str, Any] | None = None
) -> Operation:
    """Begin an operation of ours."""
    parameters = {"kind": kind, "request": Jsonb(request), "progress": Jsonb(progress or {}), "client": client()}
    row = conn.execute(sql.load("operation_begin"), parameters | _me()).fetchone()
    assert row is not None  # noqa: S101 - an INSERT of one row returns it
    return Operation(*row)


def resume(conn: psycopg.Connection[Any], number: int) -> Operation:
    """Take up an operation that has not ended. Raises `NotReady` when it has, or when somebody is at it."""
    found = conn.execute(sql.load("operation_owner"), {"id": number}).fetchone()
    if found is None:
        raise NotReady(f"there is no operation {number}: see outbox operations list")
    owner, where, state = found
    if state != "running":
        raise NotReady(f"operation {number} has ended ({state}): begin a new one")
    dead = owner if owner is not None and is_gone(where) else None
    row = conn.execute(sql.load("operation_resume"), {"id": number, "dead": dead} | _me()).fetchone()
    if row is None:
        raise NotReady(f"{owner_of(where)} is at operation {number}: stop that process, or wait until it has ended")
    return Operation(*row)


def find(
    conn: psycopg.Connection[Any],
    *,
    number: int | None = None,
    kind: str | None = None,
    state: State | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The newest `limit` operations, the last one last: id, kind, request, progress, result, state, error, who
    (database user), client (system user and host, as the command said), place, runs (whether a process is at it),
    started_at, ended_at.
    """
    parameters = {"id": number, "kind": kind, "state": state, "limit": limit}
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql.load("operation_find"), parameters).fetchall()


def _me() -> dict[str, Any]:
    return {"owner": uuid.uuid4(), "place": place(), "ttl": TTL}
