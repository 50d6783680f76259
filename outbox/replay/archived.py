"""What a replay takes from archives (`outbox.archive`): the intents that were chosen, and what becomes of each.

What is live of a dropped part of the log is in the base, and is repeated from there; an archive says which intents were
of a time, a saga, a key. Events and mails are in it alone.

Errors: `ArchiveDamaged`, before anything of the file is used; `NotReady` when two archives claim the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice, pairwise
from typing import Any

import psycopg

from outbox import archive, repetition
from outbox.archive import Archived
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.repetition import Word
from outbox.replay.choice import Choice

WORDS = ("put", "delete")


def rows(
    conn: psycopg.Connection[Any],
    choice: Choice,
    chosen: Mapping[str, Any],
    target: str,
    *,
    after: int = 0,
    endpoint: str | None = None,
) -> Iterator[Archived]:
    """The intents of a participant that were chosen (`chosen`: as it was resolved) in the archives of this log, in
    order of id, after id `after`."""
    assert choice.archive is not None  # noqa: S101 - the caller looked
    begin, end = (None if chosen[name] is None else datetime.fromisoformat(chosen[name]) for name in ("begin", "end"))
    row = conn.execute("select log from outbox.identity").fetchone()
    found = archive.find(choice.archive, log=None if row is None else row[0], endpoint=endpoint)
    if not found:
        raise NotReady(
            f"there is no archive of this log in {choice.archive}: name the place that OUTBOX_ARCHIVE named then"
        )
    for one, two in pairwise(found):
        if two.first < one.until:
            raise NotReady(
                f"the archives {one.name} and {two.name} are of the same part of the log, in two histories of it: "
                "move the one away that is not meant"
            )
    for each in found:
        if each.until > after:
            yield from (
                row
                for row in archive.read(each, endpoint=endpoint)
                if row.intent.target == target
                and row.intent.id > after
                and _chosen(choice, row)
                and (begin is None or row.created_at >= begin)
                and (end is None or row.created_at < end)
            )


def _chosen(choice: Choice, row: Archived) -> bool:
    intent = row.intent
    return (
        repetition.Repeats.read(intent) is None
        and (choice.key is None or intent.key == choice.key)
        and (choice.key_prefix is None or intent.key.startswith(choice.key_prefix))
        and (choice.model is None or intent.key.startswith(f"{choice.model}/") or _model(intent) == choice.model)
        and (choice.saga is None or intent.saga == choice.saga)
    )


def _model(intent: Intent) -> object:
    try:
        return json.loads(intent.headers or "{}").get("model")
    except (AttributeError, ValueError, RecursionError):
        return None


def chunks(found: Iterator[Archived], size: int) -> Iterator[Sequence[Archived]]:
    """`found` in pieces of at most `size`."""
    while some := list(islice(found, size)):
        yield some


def fate(row: Archived, last: dict[str, Word]) -> str:
    """What becomes of an archived intent, as in `outbox.replay.plan`; `last` are the last words by now."""
    intent = row.intent
    if row.void:
        return "recalled"
    if intent.action in WORDS:
        word = last.get(intent.key)
        if intent.action == "delete":
            # A key that is deleted has no word in the base.
            return "again" if word is None else "superseded"
        return "again" if word is not None and word.rank == intent.id else "superseded"
    if intent.target != "mail":
        return "event"
    if intent.action != "send":
        return "held"
    return "mail" if row.receipt is not None and row.receipt.get("closed_at") else "unsent"


def last_words(conn: psycopg.Connection[Any], target: str, some: Sequence[Archived]) -> dict[str, Word]:
    """The last words about the keys of a chunk, by base and log. Looks through the participant's part of it once."""
    keys = sorted({row.intent.key for row in some if row.intent.action in WORDS})
    return {word.key: word for word in repetition.words(conn, target, {"keys": keys})} if keys else {}
