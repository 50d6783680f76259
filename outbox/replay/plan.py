"""The plan: what a replay would do with each of the chosen intents, counted, before it does anything.

Reads only. What it counts changes while an application writes; what is repeated in the end is decided when it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import psycopg

from outbox import repetition, sql
from outbox.repetition import Word
from outbox.replay import archived
from outbox.replay.choice import Choice
from outbox.store import Store

LOOKS = 16
"""Blobs that are looked for in a bucket at a time."""

LEFT_OUT = {
    "event": "left out: it is neither put nor delete; --events repeats it",
    "mail": "left out: it was sent; --resend-mail sends it again",
    "superseded": "left out: something newer was said about its key",
    "recalled": "left out: its saga called it back before it was applied",
    "retry": "left out: it is parked, and will be tried again",
    "poison": "left out: it is parked; outbox parked retry, or replay --parked poison",
    "in_doubt": "left out: it is parked; outbox parked resolve",
    "blocked": "left out: it is parked behind another one of its key; outbox parked list",
    "due": "left out: its time has not come",
    "skipped": "left out: an operator skipped it; replay --parked skipped",
    "once": "left out: it was set aside, and is neither put nor delete; emit another one if it should be",
    "behind": "left out: a later intent of its key is parked; outbox parked list",
    "held": "left out: a saga holds, releases and withdraws its mails itself",
    "unsent": "left out: it has not been sent yet, and will be",
    "nowhere": "left out: its bytes are not in the store; outbox resilver blob, from another site",
}
"""Why a replay leaves an intent out: the fates of `replay_plan.sql`, but for `again` and `anew`."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plan."""

    target: str
    action: str
    fate: str
    intents: int
    #: What happens, in words.
    effect: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay would do."""

    lines: Sequence[Line]
    #: Intents to be appended.
    intents: int
    #: Participant → intents a second that its lanes have passed lately; None: nothing to measure.
    rates: Mapping[str, float | None]
    #: How long it takes, about; None: unknown.
    seconds: float | None

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self) | {"lines": [asdict(line) for line in self.lines], "rates": dict(self.rates)}


def make(
    conn: psycopg.Connection[Any],
    choice: Choice,
    chosen: Mapping[str, Any],
    *,
    rate: float | None = None,
    store: Store | None = None,
    endpoint: str | None = None,
) -> Plan:
    """Plan a replay of `choice`, resolved as `chosen`. `store` is where blobs are looked for; None: nowhere. `endpoint`
    is the S3 server's, of archives in a bucket."""
    lines: list[Line] = []
    rates: dict[str, float | None] = {}
    seconds: float | None = 0.0
    for target in choice.participants(conn):
        counts = (
            _count(conn, choice, chosen, target)
            if choice.archive is None
            else _count_archived(conn, choice, chosen, target, endpoint)
        )
        if choice.archive is None and target == "blob" and counts.get(("again", "put")) and store is not None:
            stages = {stage.name for stage in store.stages()}
            missing = sum(1 for _ in absent(store, stages, repetition.words(conn, target, meant(chosen))))
            if missing:
                counts["again", "put"] -= missing
                counts["nowhere", "put"] = missing
        made = [_line(choice, target, action, fate, n) for (fate, action), n in sorted(counts.items()) if n]
        lines += made
        todo = sum(line.intents for line in made if not line.effect.startswith("left out"))
        if todo:
            rates[target] = _rate(conn, target)
            slowest = min((r for r in (rates[target], rate) if r is not None), default=None)
            seconds = None if slowest is None or seconds is None else seconds + todo / slowest
    intents = sum(line.intents for line in lines if not line.effect.startswith("left out"))
    return Plan(lines, intents, rates, seconds)


def absent(store: Store, stages: set[str], words: Iterator[Word]) -> Iterator[Word]:
    """Puts of blobs whose bytes are nowhere: not published, not staged (in `stages`), not in the intent."""
    with ThreadPoolExecutor(LOOKS, "blobs") as pool:
        while some := list(islice(words, 1000)):
            wanted = [w for w in some if w.action == "put" and not w.inline and w.stage not in stages]
            there = pool.map(store.exists, (word.key for word in wanted))
            yield from (word for word, found in zip(wanted, there, strict=True) if not found)


def meant(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved choice says which intents are meant."""
    return {name: value for name, value in chosen.items() if name in repetition.EVERYTHING}


def _count(
    conn: psycopg.Connection[Any], choice: Choice, chosen: Mapping[str, Any], target: str
) -> dict[tuple[str, str], int]:
    with conn.transaction():
        conn.execute("set local enable_seqscan = on")
        rows = conn.execute(
            repetition.statement("replay_plan"), {**repetition.EVERYTHING, **chosen, "target": target}
        ).fetchall()
    # By what was set aside: the rest isn't meant.
    wanted = {"anew", "superseded", "once"}
    return {(fate, action): n for fate, action, n in rows if not choice.parked or fate in wanted}


def _count_archived(
    conn: psycopg.Connection[Any], choice: Choice, chosen: Mapping[str, Any], target: str, endpoint: str | None
) -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    for some in archived.chunks(archived.rows(conn, choice, chosen, target, endpoint=endpoint), 10_000):
        last = archived.last_words(conn, target, some)
        counts.update((archived.fate(row, last), row.intent.action) for row in some)
    return counts


def _line(choice: Choice, target: str, action: str, fate: str, count: int) -> Line:
    done = {
        "again": f"{action} again",
        "anew": f"{action} for the first time; a poison one is skipped with it",
        "event": f"{action} again" if choice.events else None,
        "mail": "sent again, under a new Message-ID" if choice.resend_mail else None,
    }.get(fate)
    return Line(target, action, fate, count, done or LEFT_OUT[fate])


def _rate(conn: psycopg.Connection[Any], target: str) -> float | None:
    row = conn.execute(sql.load("replay_rate"), {"target": target}).fetchone()
    return None if row is None or row[0] is None else float(row[0])
