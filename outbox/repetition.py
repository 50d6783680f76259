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
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any, LiteralString, NamedTuple

import psycopg
from psycopg.rows import class_row

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


class Word(NamedTuple):
    """The last word about a key: what the log says that a participant should have, or not have, of it."""

    #: The intent that says it: the repeated one, or a repetition of what is gone.
    id: int
    #: Where it counts among the intents of its key.
    rank: int
    key: str
    #: `put` or `delete`.
    action: str
    #: The first later intent of the key that is parked, and so not applied yet.
    first: int | None
    #: Whether that one holds the key: a repetition would queue up behind it.
    held: bool
    #: Of a put of a blob: the stage that it names, and whether its bytes are in the intent.
    stage: str | None
    inline: bool

    def again(self, since: int) -> Again:
        """What repeats it. Something parked may be applied before the repetition, and is to be noticed then."""
        return Again(self.id, since if self.first is None else min(since, self.first - 1))


#: Which intents are meant, as the parameters of `replay_chosen.sql`: by default all.
EVERYTHING: dict[str, Any] = dict.fromkeys(
    (
        "key",
        "key_prefix",
        "model",
        "keys",
        "saga",
        "begin",
        "end",
        "seen",
        "seen_first",
        "seen_high",
        "upto",
        "upto_first",
        "upto_high",
    )
)

FETCH = 1000
"""Rows that come at a time."""


def statement(name: LiteralString) -> LiteralString:
    """A statement with the condition of `replay_chosen.sql` in it."""
    return sql.load(name).replace("/* chosen */", sql.load("replay_chosen"))


def words(conn: psycopg.Connection[Any], target: str, chosen: Mapping[str, Any], *, after: str = "") -> Generator[Word]:
    """The last words that were chosen, in order of the keys' bytes, after key `after`.

    Opens a transaction on `conn` for as long as it is read; `conn` must not be in one. Memory is that of `FETCH` rows.
    """
    with conn.transaction():
        # Connections of ours forbid what a hot path must not do; this reads everything, once.
        conn.execute("set local enable_seqscan = on")
        with conn.cursor(name="outbox_words", row_factory=class_row(Word)) as cursor:
            cursor.itersize = FETCH
            cursor.execute(statement("replay_words"), {**EVERYTHING, **chosen, "target": target, "after": after})
            yield from cursor


def of_keys(conn: psycopg.Connection[Any], target: str, keys: Collection[str]) -> list[Again]:
    """What brings these keys of a participant back to what base and log say of them, for `append`.

    A key that nobody ever put is deleted. One whose next intent is parked is left out: its turn comes, or an operator
    decides. Looks through the target's part of the log once: ask for many keys at a time.
    """
    floor = since(conn)
    found = {word.key: word for word in words(conn, target, {"keys": sorted(keys)})}
    parked = {
        row[0]
        for row in conn.execute(
            "select key from outbox.parked where target = %s and key = any(%s) and reason not in ('due', 'skipped')",
            (target, sorted(keys)),
        )
    }
    never = [Again(0, floor, key, "delete", "{}") for key in sorted(keys) if key not in found and key not in parked]
    return [word.again(floor) for word in found.values() if not word.held] + never


def changed(conn: psycopg.Connection[Any], target: str, since: int) -> dict[str, int]:
    """Keys about which something was said above id `since` → what was said last. A word of a lower rank is old."""
    return dict(conn.execute(sql.load("repetition_changed"), {"target": target, "since": since}).fetchall())


def check(conn: psycopg.Connection[Any]) -> None:
    """Raise `NotReady` if this database user may not append repetitions: before anything is begun."""
    row = conn.execute(sql.load("repetition_may")).fetchone()
    if row is None or not row[0]:
        raise _refused(conn)


def _refused(conn: psycopg.Connection[Any]) -> NotReady:
    user = conn.info.user
    return NotReady(
        f"the database user {user} may not repeat intents: use a member of outbox_operator "
        f"(GRANT outbox_operator TO {user})"
    )


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
        raise _refused(conn) from None
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
        "actions": [intent.action for intent, _ in repetitions],
        "floor": min(says.since for _, says in repetitions),
        "start": start.snapshot,
        "start_first": start.first,
        "start_high": start.high,
        "end": end.snapshot,
        "end_first": end.first,
        "end_high": end.high,
        "target": target,
        "slot_low": slots.low,
        "slot_high": slots.high,
    }
    return {row[0] for row in conn.execute(sql.load("repetition_overtaken"), parameters)}
