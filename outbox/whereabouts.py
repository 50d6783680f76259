"""Where an intent is, what it waits for, and the command that would move it.

Called by `outbox why` and `outbox parked show`. Reads only, with the rights of `outbox_reader`; one consistent
picture, except that open transactions are looked for first: what was not open then, and is not there after, was
rolled back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row

from outbox import audit, decision, sql
from outbox.errors import NotReady
from outbox.lane import owner_of
from outbox.parked import Reason
from outbox.plural import counted
from outbox.span import seconds

COUNT_LIMIT = 10_000
"""Intents in front of one are counted up to here."""

REPEATED = 100
"""Repetitions of an intent are listed up to here."""

OVERDUE = 10.0
"""Seconds after its time from which the lane is suspected, and not the intent."""

WORKERS = ("index", "blob", "mail")
"""Participants whose worker is `outbox work TARGET`."""


State = Literal[
    "undrawn", "open", "rolled_back", "dropped", "unregistered", "committed", "behind", "in_hand", "applied"
]
"""Where an intent can be, unless it is parked."""


@dataclass(slots=True)
class Whereabouts:
    """Where an intent is. Every value is JSON, but for times."""

    id: int
    state: State | Reason
    #: One sentence, or a few.
    says: str
    #: What would move it; None if nothing needs to, or can.
    command: str | None = None
    #: Its row in the log.
    intent: dict[str, Any] | None = None
    lane: dict[str, Any] | None = None
    parked: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    #: Its repetitions, the newest first: id, created_at, operation. At most `REPEATED`.
    repeated: list[dict[str, Any]] = field(default_factory=list)
    #: What operators did with it, the last thing last.
    audit: list[dict[str, Any]] = field(default_factory=list)


def find(conn: psycopg.Connection[Any], number: int) -> Whereabouts:
    """Where intent `number` is. Raises `NotReady` without the rights to see it."""
    try:
        return _find(conn, number)
    except psycopg.errors.InsufficientPrivilege:
        user = conn.info.user
        raise NotReady(
            f"the database user {user} may not see where intents are: use a member of outbox_reader "
            f"(GRANT outbox_reader TO {user})"
        ) from None


def _find(conn: psycopg.Connection[Any], number: int) -> Whereabouts:
    with conn.cursor(row_factory=dict_row) as cursor:
        log = cursor.execute(sql.load("whereabouts_log")).fetchone()
        holders = cursor.execute(sql.load("status_holders")).fetchall()
        with conn.transaction():
            cursor.execute("set transaction isolation level repeatable read, read only")
            intent = cursor.execute(sql.load("whereabouts_intent"), {"id": number}).fetchone()
            trail = audit.find(conn, intent=number)
            if intent is None:
                assert log is not None  # noqa: S101 - a sequence always has its row
                archived = cursor.execute(sql.load("archive_find"), {"id": number}).fetchone()
                found = decision.find(conn, decision.Choice(ids=[number]))
                if found:
                    # A row of the base, which a participant that is rebuilt was given and could not apply.
                    says, command = _parked(found[0], None, None, trail)
                    says = f"{says} {_archive(archived)}"
                    return Whereabouts(number, found[0]["reason"], says, command, parked=found[0], audit=trail)
                return _absent(number, log, archived, holders, trail)
            wanted = {**intent, "limit": COUNT_LIMIT}
            lane = cursor.execute(sql.load("whereabouts_lane"), wanted).fetchone()
            found = decision.find(conn, decision.Choice(ids=[number]))
            receipt = cursor.execute(sql.load("whereabouts_receipt"), wanted).fetchone()
            head = cursor.execute(sql.load("whereabouts_head"), wanted).fetchone()
            unique = cursor.execute(sql.load("whereabouts_unique"), wanted).fetchone()
            repeated = cursor.execute(sql.load("whereabouts_again"), {**intent, "limit": REPEATED}).fetchall()
            relayed = cursor.execute(sql.load("whereabouts_relayed"), wanted).fetchone()
    parked = found[0] if found else None
    state: State | Reason
    if parked is not None:
        state, (says, command) = parked["reason"], _parked(parked, lane, head, trail)
    else:
        state, says, command = _unparked(intent, lane, receipt, relayed)
    if unique is not None:
        says, command = _unique(unique, says, command, dead=state == "poison")
    clock = ("ticked", "clock_runs", "clock_stopped")
    shown = {name: value for name, value in intent.items() if name not in clock}
    says = " ".join([says, *_repetitions(intent, repeated)])
    return Whereabouts(number, state, says, command, shown, lane, parked, receipt, repeated=repeated, audit=trail)


def _absent(
    number: int,
    log: dict[str, Any],
    archived: dict[str, Any] | None,
    holders: list[dict[str, Any]],
    trail: list[dict[str, Any]],
) -> Whereabouts:
    if number > log["last_id"] or number < 1:
        says = f"No intent has this id: the last one drawn is {log['last_id']}."
        return Whereabouts(number, "undrawn", says, "outbox status")
    if number < log["first_id"]:
        says = f"It was passed by retention: the log begins with id {log['first_id']}. {_archive(archived)}"
        return Whereabouts(number, "dropped", says, audit=trail)
    if holders:
        first = holders[0]
        name = first["prepared"] or f"pid {first['pid']}"
        says = (
            f"It is not committed: its transaction is still open, or was rolled back. Transactions that have written "
            f"to the log and not ended: {len(holders)}; the oldest is {name}, open for {seconds(first['seconds'])}."
        )
        return Whereabouts(number, "open", says, "outbox status")
    says = "It was rolled back: its id was drawn, and its transaction has ended without a commit."
    return Whereabouts(number, "rolled_back", says)


def _repetitions(intent: dict[str, Any], repeated: list[dict[str, Any]]) -> Iterator[str]:
    """What it repeats, and what repeats it."""
    if intent["repeats"] is not None:
        what = f"intent {intent['repeats']}" if intent["repeats"] else "the deletion of a key that nobody put"
        yield f"It repeats {what}{_operation(intent)}, and is left out if something newer came before it."
    if repeated:
        last = repeated[0]
        times = f"{REPEATED} times or more" if len(repeated) == REPEATED else counted(len(repeated), "time")
        yield f"It was repeated {times}, last by intent {last['id']}{_operation(last)}."


def _operation(row: dict[str, Any]) -> str:
    return "" if row["operation"] is None else f" for operation {row['operation']}"


def _archive(archived: dict[str, Any] | None) -> str:
    if archived is None or not archived["name"]:
        return "It was not archived."
    return f"If it was committed, it is in the archive {archived['name']} in {archived['place']}."


def _unique(unique: dict[str, Any], says: str, command: str | None, *, dead: bool) -> tuple[str, str | None]:
    """What the key of an actor's unique message says about it, and others."""
    if unique["pending"] and not unique["own"]:
        other = f"Intent {unique['id']} has the same unique key and is pending"
        return f"{says} {other}{': it is retried when that is done' if dead else ''}.", f"outbox why {unique['id']}"
    if unique["pending"]:
        return f"{says} It has a unique key: while it is pending, no other message of that is sent.", command
    if unique["own"] and unique["taken"]:
        return (
            f"{says} No other message of its unique key is sent until {unique['until']:%Y-%m-%d %H:%M:%S %Z}.",
            command,
        )
    return says, command


def _unparked(
    intent: dict[str, Any],
    lane: dict[str, Any] | None,
    receipt: dict[str, Any] | None,
    relayed: dict[str, Any] | None,
) -> tuple[State, str, str | None]:
    target = intent["target"]
    if lane is None:
        says = f"Nobody reads it: no participant {target} is registered. It was written past outbox.emit."
        return "unregistered", says, f"""psql "$OUTBOX_DATABASE" -c "select outbox.register('{target}')" """.strip()
    if lane["in_hand"]:
        says = f"It is in the hands of an actor's worker: {owner_of(lane['place'])} has lane {_name(lane)}."
        return "in_hand", says, "outbox status"
    if lane["passed"] and relayed is not None and relayed["verdict"] is None:
        when = f"{relayed['relayed_at']:%Y-%m-%d %H:%M:%S %Z}"
        return "in_hand", f"It was relayed at {when}, and the far side has not told what became of it.", None
    if lane["passed"]:
        return "applied", _applied(lane, receipt), None
    if not intent["ticked"]:
        return _unticked(intent)
    some = counted(lane["before"], "intent", then=(" is", " are"))
    before = f"{COUNT_LIMIT:,} or more intents are" if lane["before"] >= COUNT_LIMIT else some
    says, command = _drained(lane)
    return "behind", f"Lane {_name(lane)} has not come to it: {before} before it. {says}", command


def _unticked(intent: dict[str, Any]) -> tuple[State, str, str | None]:
    says = f"It is committed ({intent['created_at']:%Y-%m-%d %H:%M:%S %Z}), and no tick shows it yet: "
    if intent["clock_stopped"]:
        return "committed", f"{says}the clock is stopped: {intent['clock_stopped']}.", None
    if intent["clock_runs"]:
        return "committed", f"{says}the clock runs, look again.", None
    return "committed", f"{says}no clock is running.", "outbox work clock"


def _applied(lane: dict[str, Any], receipt: dict[str, Any] | None) -> str:
    when = f", by {lane['passed_at']:%Y-%m-%d %H:%M:%S %Z}" if lane["passed_at"] else ""
    says = f"It is applied{when}: lane {_name(lane)} has passed it ({lane['position']})."
    if receipt is None:
        return says
    if "heuristic" in receipt["evidence"]:
        return f"{says} That its effect happened is what an operator decided."
    return f"{says} Its receipt is {receipt['state']}, after {counted(receipt['attempts'], 'attempt')}."


def _parked(
    parked: dict[str, Any], lane: dict[str, Any] | None, head: dict[str, Any] | None, trail: list[dict[str, Any]]
) -> tuple[str, str | None]:
    error = f" ({parked['error']})" if parked["error"] else ""
    tries = f"tried {counted(parked['attempts'], 'time')}"
    retry, resolve = f"outbox parked retry {parked['id']}", f"outbox parked resolve {parked['id']} --sent"
    command: str | None = None
    if parked["reason"] == "running":
        says = f"It is in the hands of an actor's worker; {tries}{error}. If that dies, it is tried again."
    elif parked["trying"]:
        says = f"It is being tried now; {tries}{error}."
    elif parked["reason"] == "skipped":
        by = next((row for row in reversed(trail) if row["action"] == "skip"), None)
        who = f" by {by['who']} ({by['client']}) at {by['at']:%Y-%m-%d %H:%M:%S %Z}" if by else ""
        says = f"It was skipped{who}: it will not be tried. Emit another intent if it should be."
    elif parked["reason"] == "poison":
        says, command = f"It can't succeed as it is{error}; {tries}. Remove the cause and retry it, or skip it.", retry
    elif parked["reason"] == "in_doubt":
        says = f"Its effect may have happened{error}; {tries}. Find out, and say so with --sent or --not-sent."
        command = resolve
    elif parked["reason"] == "blocked":
        says, command = _blocked(head)
    else:
        says, command = _waiting(parked, f"{error}; {tries}"), retry
        if parked["retry_seconds"] < -OVERDUE and lane is not None:
            doing, command = _drained(lane)
            says = f"Its time came {seconds(-parked['retry_seconds'])} ago{error}; {tries}. {doing}"
    return says, command


def _blocked(head: dict[str, Any] | None) -> tuple[str, str | None]:
    """→ what a blocked intent waits for, and the command that moves its key's head."""
    if head is None:
        return "It was blocked behind another of its key, and has its turn now.", None
    if head["reason"] == "in_doubt":
        command = f"outbox parked resolve {head['id']} --sent"
    else:
        command = f"outbox parked retry {head['id']}"
    return f"It is blocked behind intent {head['id']} of its key, which is parked: {head['reason']}.", command


def _waiting(parked: dict[str, Any], tries: str) -> str:
    when = f"{parked['retry_at']:%Y-%m-%d %H:%M:%S %Z} (in {seconds(max(0.0, parked['retry_seconds']))})"
    return f"It is scheduled for {when}." if parked["reason"] == "due" else f"It is tried again at {when}{tries}."


def _drained(lane: dict[str, Any]) -> tuple[str, str | None]:
    """→ what the lane is doing, and the command if it isn't drained."""
    name, work = _name(lane), f"outbox work {lane['target']}" if lane["target"] in WORKERS else None
    if lane["state"] == "stopped":
        return f"The lane is stopped: {lane['reason']}.", None
    if not lane["drained"]:
        return f"Nobody drains lane {name}: run its worker.", work
    if lane["state"] == "waiting":
        return f"The lane waits: {lane['reason']}.", None
    return f"{owner_of(lane['place'])} drains it (epoch {lane['epoch']}).", None


def _name(lane: dict[str, Any]) -> str:
    return f"{lane['target']}/{lane['lane']}"
