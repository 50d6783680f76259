"""A repetition: an intent that says once more what an earlier one said, so that a participant gets it back.

A replay and a repair never reach into a participant. They append repetitions to the log, and the lanes apply them in
order like anything else. Which intent one repeats stands in its headers:

    {"replay": {"of": 17, "since": 4200, "operation": 3}}

**A repetition never overwrites something newer.** Two things see to that. Whoever writes one has looked whether the
repeated intent is its key's last word; `since` is an id that everything is above which he can't have seen. And the
reader, before it applies one, looks for a put or delete of the same key above `since` that comes before it in the
lane, and leaves the repetition out if there is one: it counts as applied. What comes after it in the lane overwrites
it anyway. Among the intents of a key it counts where the repeated one stands (its *rank*), so that what is live by base
and log (`outbox.live`) is the same before and after.

An operation writes them, under its lease, and so says who repeated what: `append` is called in the transaction that
saves the operation's progress, and is durable with it.

Errors: `NotReady` when the operation is not under way, or the participant is none that is repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.log import Slots
from outbox.operation import Operation
from outbox.tick import Tick

HEADER = "replay"


class Again(NamedTuple):
    """What is to be repeated: an intent of base or log by its id, or, with a key, what is said here."""

    #: The repeated intent; 0 when there is none (a delete of what nobody ever put).
    of: int
    #: `since`, or None for an event: nothing overtakes it.
    since: int | None
    key: str | None = None
    action: str | None = None
    #: JSON text.
    body: str | None = None


class Repeats(NamedTuple):
    """What the headers of a repetition say."""

    of: int
    since: int
    anew: bool = False

    @classmethod
    def read(cls, intent: Intent) -> Repeats | None:
        """None if the intent repeats no state: anything may stand in headers that an application wrote."""
        if intent.headers is None or f'"{HEADER}"' not in intent.headers:
            return None
        try:
            says = json.loads(intent.headers)[HEADER]
            if all(type(says[name]) is int and 0 <= says[name] < 10**18 for name in ("of", "since")):
                return cls(says["of"], says["since"], says.get("anew") is True)
        except (KeyError, TypeError, ValueError, RecursionError):
            pass
        return None


def since(conn: psycopg.Connection[Any]) -> int:
    """An id that every intent is above which this moment doesn't show.

    Ask before looking what the last words are: what is not seen then is above it.
    """
    row = conn.execute(sql.load("repetition_since")).fetchone()
    assert row is not None  # noqa: S101 - a select without FROM has one row
    return int(row[0])


def append(
    conn: psycopg.Connection[Any], operation: Operation, target: str, again: Sequence[Again], *, anew: bool = False
) -> tuple[int, list[int]]:
    """Append repetitions, in order, in the caller's transaction. → its xid, and their ids.

    `anew`: what they repeat was set aside for good, and they stand for it.
    """
    made = any(one.key is not None for one in again)
    parameters = {
        "operation": operation.id,
        "epoch": operation.epoch,
        "target": target,
        "ids": [one.of for one in again],
        "sinces": [one.since for one in again],
        "anew": anew,
        "keys": [one.key for one in again] if made else None,
        "actions": [one.action for one in again] if made else None,
        "payloads": [one.body for one in again] if made else None,
    }
    try:
        row = conn.execute(sql.load("repetition_append"), parameters).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        user = conn.info.user
        raise NotReady(
            f"the database user {user} may not repeat intents: use a member of outbox_operator "
            f"(GRANT outbox_operator TO {user})"
        ) from None
    except psycopg.DatabaseError as error:
        if error.sqlstate == "OB015":
            raise NotReady(f"{error.diag.message_primary}. {error.diag.message_hint}") from None
        raise
    assert row is not None  # noqa: S101 - a select without FROM has one row
    return int(row[0]), list(row[1])


def overtaken(
    conn: psycopg.Connection[Any],
    target: str,
    slots: Slots,
    repetitions: Sequence[tuple[Intent, Repeats]],
    *,
    start: Tick,
    end: Tick,
) -> set[int]:
    """Those of a lane's next `repetitions` that something newer of their key has come before.

    `start` is the tick that the lane has passed, `end` the one that it reads up to; everything in the batch before
    each of them must have been recorded, as applied or as parked.
    """
    parameters = {
        "ids": [intent.id for intent, _ in repetitions],
        "keys": [intent.key for intent, _ in repetitions],
        "ofs": [says.of for _, says in repetitions],
        "sinces": [says.since for _, says in repetitions],
        "anews": [says.anew for _, says in repetitions],
        "floor": min(says.since for _, says in repetitions),
        "high": end.high,
        "start": start.snapshot,
        "end": end.snapshot,
        "target": target,
        "slot_low": slots.low,
        "slot_high": slots.high,
    }
    return {row[0] for row in conn.execute(sql.load("repetition_overtaken"), parameters)}
