"""The index participant: intents into Xapian.

Called by `workers.reader`; one object serves one lane, and a lane is one shard (`workers.shard`). Payloads are
those of `outbox.document`; `outbox.search` reads what is written here.

What is durable when `apply` returns: the documents of the batch and the lane's position, which go into one
Xapian transaction, so that either both survive a crash or neither. Applying a batch again changes nothing.
Of several intents of one key in a batch only the last one is written: nobody could see the ones before.

Each document holds its key as a unique term, and stores as JSON its key, the id and the digest of the intent
that wrote it (sha256 of the body), its title, text and data.

Errors: `Unavailable`, `Fenced` and `NotThisLane`, from the shard; nothing of the batch was written then. An intent
that can't be indexed is POISON, and later ones of its key in the batch are BLOCKED.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from outbox import generation
from outbox.document import LANGUAGES, TITLE, Content, key_term, term
from outbox.errors import NotThisLane, Permanent
from outbox.intent import Intent
from outbox.participant import APPLIED, Doubt, Evidence, Item, LaneView, Outcome, Verdict
from outbox.position import Position
from outbox.search import shards
from workers.shard import POSITION, Shard, inventory, new_generator, xapian

TITLE_WEIGHT = 3
"""A word in the title counts like so many in the text."""

BLOCKED = Outcome(Verdict.BLOCKED)

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class IndexParticipant:
    """Applies the intents of one lane to its shard."""

    #: About 1 MB of text in a commit is where Xapian is fastest. It also bounds the memory of a transaction:
    #: XAPIAN_FLUSH_THRESHOLD (10,000 documents) is never reached, and needs no setting.
    batch_limit = 1000
    batch_bytes = 1_000_000
    records_attempts = False
    keeps_position = True

    def __init__(self, directory: Path, *, serves: bool = True) -> None:
        """`directory` is the index's, that of all shards. `serves`: what is opened may be searched."""
        self._directory = directory
        self._serves = serves
        self._opened: Shard | None = None

    @property
    def _shard(self) -> Shard:
        if self._opened is None:
            raise RuntimeError("open comes first")
        return self._opened

    @property
    def remedy(self) -> str:
        """What to do when the shard's position is not of this log."""
        return self._shard.remedy

    def open(self, lane: LaneView) -> None:
        """Open the lane's shard, or make it. May be called again. Raises `Unavailable`, `Fenced`, `NotThisLane`."""
        self.close()
        newest = generation.current(self._directory)
        if newest > lane.generation:
            raise NotThisLane(
                f"the index in {self._directory} is of generation {newest}, and this database knows {lane.generation}: "
                "it is another database, or was restored to an earlier time. Nothing was changed. Either set "
                "OUTBOX_DATABASE to the one that the index was fed from, or run `outbox resilver index`"
            )
        place = generation.folder(self._directory, lane.generation)
        self._opened = Shard(place / f"{lane.lane:02d}", lane.epoch, lane.slots, format_of_documents())
        self._opened.database()
        if self._serves and newest < lane.generation:
            # Who built it died before it could say so; or all of the index was lost, and is filled again.
            generation.ready(self._directory, lane.generation)

    def position(self) -> Position | None:
        """How far the shard is; None for a new one. Raises `Unavailable`, `Fenced`."""
        shard = self._shard
        db = shard.database()
        try:
            text = db.get_metadata(POSITION).decode()
            return Position.parse(text) if text else None
        except (xapian.DatabaseError, ValueError) as error:
            shard.drop()
            raise shard.damaged(error) from error

    def apply(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
        """Write a batch. Raises `Unavailable`, `Fenced`."""
        outcomes, last = _plan(batch)
        if any(outcome.verdict is not Verdict.APPLIED for outcome in outcomes):
            position = None
        if last or position is not None:
            shard = self._shard
            with shard.transaction() as db:
                write(shard, db, last)
                if position is not None:
                    db.set_metadata(POSITION, str(position))
        return outcomes

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Never called: attempts are not recorded."""

    def settle(self, batch: Sequence[Intent]) -> None:
        """Nothing to tidy up."""

    def probe(self, doubts: Sequence[Doubt]) -> list[tuple[Evidence, dict[str, Any] | None]]:
        """Never needed: a batch is in the index if its position is."""
        return [(Evidence.UNKNOWN, None) for _ in doubts]

    def inventory(self) -> Iterator[Item]:
        """Every document of the opened lane, or of all shards if none was opened. Raises `Unavailable`."""
        for path in shards(self._directory) if self._opened is None else [self._opened.path]:
            yield from inventory(path)

    def close(self) -> None:
        """Let go of the shard."""
        if self._opened is not None:
            self._opened.drop()


class Put(NamedTuple):
    """A document that is ready to be written: only the disk can fail it."""

    content: Content
    #: What is stored with the document.
    record: bytes
    #: Its keywords.
    terms: list[str]


def _plan(batch: Sequence[Intent]) -> tuple[list[Outcome], dict[str, Put | None]]:
    """→ what becomes of each intent, and key → what to write in the end (None: delete)."""
    outcomes: list[Outcome] = []
    last: dict[str, Put | None] = {}
    failed: set[str] = set()
    for intent in batch:
        if intent.key in failed:
            outcomes.append(BLOCKED)
            continue
        try:
            last[intent.key] = ready(intent)
        except Permanent as error:
            failed.add(intent.key)
            outcomes.append(Outcome(Verdict.POISON, error=str(error)))
        else:
            outcomes.append(APPLIED)
    return outcomes, last


def ready(intent: Intent) -> Put | None:
    """Everything about an intent that can fail because of it. Raises `Permanent`."""
    if intent.action == "delete":
        return None
    if intent.action != "put":
        raise Permanent("the index knows no such action: emit put or delete, and skip this intent")
    content = Content.of(intent.payload)
    try:
        record = _encode(
            {
                "key": intent.key,
                "id": intent.id,
                "digest": sha256(intent.body.encode()).hexdigest(),
                "title": content.title,
                "text": content.text,
                "data": content.data,
            }
        ).encode()
        terms = [term(field, value) for field, values in content.keywords.items() for value in values]
        "".join(terms).encode()
    except (ValueError, RecursionError) as error:
        # A lone surrogate, an infinite number.
        raise Permanent(
            f"the payload can't be stored ({type(error).__name__}): correct what writes it, then skip this intent"
        ) from error
    return Put(content, record, terms)


def write(shard: Shard, db: Any, last: dict[str, Put | None]) -> None:
    """Inside a transaction, write what is left of a batch."""
    fields = shard.fields
    for key, put in last.items():
        unique = key_term(key)
        if put is None:
            db.delete_document(unique)
            continue
        content = put.content
        db.replace_document(unique, document_of(put, unique, shard.generator(content.language)))
        if content.keywords and not content.keywords.keys() <= fields:
            fields |= content.keywords.keys()
    if fields != shard.fields:
        shard.know(fields)


def document_of(put: Put, unique: str, generator: Any) -> Any:
    """The xapian.Document of a put: what is indexed of it, and how. `generator` is that of its language."""
    content = put.content
    doc = xapian.Document()
    doc.set_data(put.record)
    # replace_document looks for the term, but doesn't add it.
    doc.add_boolean_term(unique)
    for each in put.terms:
        doc.add_boolean_term(each)
    generator.set_document(doc)
    if content.title:
        generator.index_text(content.title, 1, TITLE)
        generator.index_text(content.title, TITLE_WEIGHT)
        # No phrase reaches from the title into the text.
        generator.increase_termpos()
    if content.text:
        generator.index_text(content.text)
    return doc


@cache
def format_of_documents() -> str:
    """What this version makes of documents, in 16 hex digits: of its terms, counts and positions, in each language.

    A sample is indexed and hashed, so that a new weight, prefix or stemmer can't go unnoticed. A shard keeps the
    format that it was made with; it goes on, also with documents of two formats, until it is resilvered.
    """
    digest = sha256()
    for language in LANGUAGES:
        payload = {**_SAMPLE, "language": language}
        put = ready(Intent.make("index", "put", _SAMPLE_KEY, payload))
        assert put is not None  # noqa: S101 - it is no delete
        doc = document_of(put, key_term(_SAMPLE_KEY), new_generator(language))
        for item in doc.termlist():
            digest.update(repr((item.term, item.wdf, list(item.positer))).encode())
        digest.update(repr(sorted(json.loads(put.record))).encode())
    return digest.hexdigest()[:16]


_SAMPLE_KEY = "k" * 300
_SAMPLE = {
    "title": "Annual Reports: Größere Häuser, naïve cafés",
    "text": "The children were running through happily connected e-mails (U.S.A., 3.14, C++); 日本語の検索 добрый день",
    "keywords": {"folder": ["lib/x", "v" * 300]},
    "data": {"url": "/1"},
}
