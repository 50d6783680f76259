"""The log: the only module that appends to `outbox.log` and reads batches of it.

Appending happens inside the application's transaction and is durable when that commits. Reading never
locks, updates or deletes anything.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import psycopg

from outbox import sql
from outbox.intent import Intent
from outbox.position import Position
from outbox.tick import Tick

# `Intent._make` without its Python frame: a page has thousands of rows, and this is the hot path.
_INTENT = cast("Callable[[Any], Intent]", partial(tuple.__new__, Intent))


_BODY = attrgetter("body")


def _row_factory(_cursor: Any) -> Callable[[Any], Intent]:
    return _INTENT


@contextmanager
def no_collection() -> Iterator[None]:
    """Thousands of new tuples set the garbage collector off several times a page, and none of them is garbage."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Slots(NamedTuple):
    """A lane's share of the keys, both ends included."""

    low: int = 0
    high: int = 16383


def append_parameters(intents: Sequence[Intent]) -> Mapping[str, Any]:
    """`intents` as the parameters of `log_append.sql`: one array for each column."""
    return {
        "target": [i.target for i in intents],
        "action": [i.action for i in intents],
        "key": [i.key for i in intents],
        "payload": [i.body for i in intents],
        "due": [i.due for i in intents],
        "saga": [i.saga for i in intents],
        "headers": [i.headers for i in intents],
    }


def append_one(intent: Intent) -> tuple[Any, ...]:
    """`intent` as the parameters of `log_append_one.sql`."""
    return (intent.target, intent.action, intent.key, intent.body, intent.due, intent.saga, intent.headers)


def page(
    conn: psycopg.Connection[Any],
    start: Tick,
    end: Tick,
    *,
    target: str,
    slots: Slots,
    after: int = 0,
    limit: int = 1000,
) -> list[Intent]:
    """The next intents of batch `start` → `end` for one lane, in order of id, after id `after`.

    Fewer than `limit` means that the batch ends with them. Whole transactions only: all intents of one
    transaction lie in the same batch, whichever ticks are chosen. After PgQ's two-snapshot batches
    (Skytools, `pgq.batch_event_sql`). Both ticks are of one era: see `outbox.tick.reach`.

    From the first tick, where a participant begins that holds nothing, the base comes before the log: its rows have
    smaller ids, and are puts.
    """
    if start.shows_nothing:
        return _first_page(conn, end, target=target, slots=slots, after=after, limit=limit)
    with conn.cursor(row_factory=_row_factory) as cursor, no_collection():
        return cursor.execute(
            sql.load("log_page"),
            {
                **_between(start, end),
                "after": after,
                "target": target,
                "slot_low": slots.low,
                "slot_high": slots.high,
                "limit": limit,
            },
        ).fetchall()


def glance(
    conn: psycopg.Connection[Any], start: Tick, end: Tick, *, targets: Sequence[str], limit: int
) -> list[tuple[Intent, int]]:
    """The first intents of batch `start` → `end` of all lanes of `targets`, in order of id, each with its slot.

    One statement, however many lanes there are. Fewer than `limit` means that there are no more. Not for the first
    tick of a log, and both ticks are of one era.
    """
    rows = conn.execute(sql.load("log_glance"), {**_between(start, end), "targets": list(targets), "limit": limit})
    return [(Intent._make(row[:-1]), row[-1]) for row in rows]


def _between(start: Tick, end: Tick) -> Mapping[str, Any]:
    """What is said of two ticks in a statement that reads from one to the other."""
    if start.first != end.first:
        raise ValueError(
            f"ticks {start.id} and {end.id} are of two eras: outbox.tick.reach says how far a batch can go"
        )
    seen, end_seen = start.seen, end.seen
    return {
        "stragglers": [str(xid) for xid in sorted(seen.running) if end_seen.ended(xid)],
        "first": start.first,
        "floor": start.floor,
        "high": end.high,
        "xmax": str(seen.xmax),
        "snapshot": end.snapshot,
    }


def _first_page(
    conn: psycopg.Connection[Any], end: Tick, *, target: str, slots: Slots, after: int, limit: int
) -> list[Intent]:
    with conn.cursor(row_factory=_row_factory) as cursor, no_collection():
        return cursor.execute(
            sql.load("log_page_first"),
            {
                "after": after,
                "first": end.first,
                "high": end.high,
                "snapshot": end.snapshot,
                "target": target,
                "slot_low": slots.low,
                "slot_high": slots.high,
                "limit": limit,
            },
        ).fetchall()


def beyond(conn: psycopg.Connection[Any], tick: Tick) -> bool:
    """Whether anything has committed that `tick` doesn't show yet."""
    row = conn.execute(
        sql.load("log_beyond"),
        {
            "first": tick.first,
            "floor": tick.floor,
            "snapshot": tick.snapshot,
            "stragglers": [str(xid) for xid in sorted(tick.seen.running)],
        },
    ).fetchone()
    return bool(row and row[0])


def fetch(conn: psycopg.Connection[Any], ids: Sequence[int]) -> list[Intent]:
    """The intents with these ids, in order of id."""
    return [_INTENT(row) for row in conn.execute(sql.load("log_fetch"), {"ids": list(ids)})]


def step(position: Position, end: Tick, after: int | None) -> Position:
    """The position after a page of the batch from `position` to `end`.

    `after` is the last intent done if the batch goes on behind it, None if the batch is done.
    """
    if after is None:
        return Position(position.log, end.id, end.nonce)
    return position._replace(upto=end.id, after=after)


def cut(page: Sequence[Intent], budget: int) -> list[tuple[Sequence[Intent], bool]]:
    """`page` in batches of about `budget` bytes, each with whether it is the last one."""
    total = sum(map(len, map(_BODY, page)))
    if total <= budget:
        return [(page, True)] if page else []
    batches: list[list[Intent]] = [[]]
    size = 0
    for intent in page:
        if batches[-1] and size + len(intent.body) > budget:
            batches.append([])
            size = 0
        batches[-1].append(intent)
        size += len(intent.body)
    return [(batch, batch is batches[-1]) for batch in batches]
