"""Taking a log over that can't go on where it is: how the next era is opened.

Called by `outbox adopt`. `plan` shows what is known before; `adopt` is one transaction, and kills before or after it
leave nothing half done. What it leaves:

* Every intent of before that was not applied is read by its lane as always, in the log's order.
* Of a participant that records its attempts, each of them is in doubt: the worker looks first, and what nobody can know
  is parked for an operator. The index finds out by its own position, a blob can be put twice, and a saga's state was
  restored with the log.
* Ids, ticks and epochs go on with a gap: nothing of the lost time is ever drawn again.

Errors: `NotReady` when there is nothing to adopt, while a worker owns a lane, or when what was restored and what was
written here can't be told apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from outbox import era, operation, sql
from outbox.decision import client
from outbox.era import Era, Trouble
from outbox.errors import NotReady
from outbox.failpoint import hit
from outbox.operation import Operation
from outbox.watermark import Watermark

IDEMPOTENT = ("blob", "index", "saga")
"""Participants that can do again what may have been done. The same list stands in outbox.adopt."""

PATIENCE = 60.0
"""Seconds that `adopt` waits for the leases of workers that have died; the default lease is a quarter of that."""

AGAIN_EVERY = 0.2
"""Seconds between its looks."""

_OWNED = "OB012"
_REFUSED = "OB011"


class Undone(NamedTuple):
    """What a participant has not done of the log."""

    target: str
    #: Intents that are committed, and not applied.
    not_done: int
    #: Of these, how many are parked and would be tried by themselves.
    parked: int
    #: Of these, how many are in doubt after `adopt`: their worker looks first.
    in_doubt: int


class Plan(NamedTuple):
    """What is to be adopted."""

    era: Era
    trouble: Trouble
    participants: list[Undone]


class Adopted(NamedTuple):
    """What `adopt` did."""

    #: The number of the new era.
    era: int
    #: How many intents of before are not done.
    not_done: int
    #: How many of these are in doubt.
    in_doubt: int


def plan(conn: psycopg.Connection[Any], watermark: Watermark) -> Plan:
    """What is wrong, and what is not done. Raises `NotReady` when nothing is wrong."""
    found = era.look(conn)
    trouble = found.trouble
    if trouble is None and (says := watermark.trouble(conn, found)):
        trouble = Trouble("halted", says)
    if trouble is None:
        raise NotReady(
            f"there is nothing to adopt: the log goes on in this server (era {found.number}). "
            "If a lane is stopped, outbox status says why"
        )
    rows = conn.execute(sql.load("adoption_plan")).fetchall()
    return Plan(
        found,
        trouble,
        [Undone(target, count, parked, 0 if _does_it_again(target) else count) for target, count, parked in rows],
    )


def _does_it_again(target: str) -> bool:
    """Whether what may have been done is done again, and nobody asks: actors run at least once."""
    return target in IDEMPOTENT or target.startswith("actor.")


def adopt(conn: psycopg.Connection[Any], plan: Plan, say: Callable[[str], None] = lambda _: None) -> Adopted:
    """Open the next era. Durable when it returns; recorded as an operation `adopt`.

    Waits for whoever is writing to the log, and up to `PATIENCE` seconds for leases to run out (`say` is told so).
    """
    work = _begin(conn, plan)
    hit("adopt.begun")
    deadline = time.monotonic() + PATIENCE
    said = False
    try:
        while True:
            try:
                adopted = _adopt(conn, plan, work)
            except psycopg.DatabaseError as error:
                if error.sqlstate != _OWNED or time.monotonic() > deadline:
                    raise
            else:
                hit("adopt.adopted")
                return adopted
            if not said:
                say("a lane is owned: waiting until its lease has run out")
            said = True
            time.sleep(AGAIN_EVERY)
    except psycopg.DatabaseError as error:
        if error.sqlstate not in (_OWNED, _REFUSED):
            raise
        why = f"{error.diag.message_primary}. {error.diag.message_hint}"
        work.end(conn, "failed", error=why)
        raise NotReady(why) from None


def _begin(conn: psycopg.Connection[Any], plan: Plan) -> Operation:
    """Our operation, or the one that was killed at this."""
    for row in operation.find(conn, kind="adopt", state="running"):
        return operation.resume(conn, row["id"])
    return operation.begin(conn, "adopt", {"closes": plan.era.number, "because": plan.trouble.kind})


def _adopt(conn: psycopg.Connection[Any], plan: Plan, work: Operation) -> Adopted:
    with conn.transaction():
        row = conn.execute(
            "select * from outbox.adopt(%s, %s, %s, %s)",
            (plan.era.number, plan.trouble.kind == "dump", plan.trouble.says, client()),
        ).fetchone()
        assert row is not None  # noqa: S101 - the function returns one row
        adopted = Adopted(*row)
        work.end(conn, result=adopted._asdict())
        hit("adopt.written")
    return adopted
