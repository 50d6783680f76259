"""Scrub's look at the index: each document against what the log says that it is made of.

Xapian's tables have no checksums, so a document is checked by its content. It is made anew from its intent, and
compared with what is stored: record, words with their frequencies and places, keywords. Then it is looked up the other
way round, as a search does it: whether its key and some of its words lead to it.

Documents are looked at beside the writer, and read again when it has overtaken us. Errors: `Unavailable` when a shard
can't be opened, `NotReady` when there is no index, `NotThisLog`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import md5, sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from outbox.document import TERM_LIMIT, key_term
from outbox.errors import Permanent, Unavailable
from outbox.intent import Intent
from outbox.log import Slots
from outbox.position import Position
from outbox.search import TRIES, shards
from workers.index import document_of, format_of_documents, ready
from workers.scrub.finding import Kind, Repair
from workers.scrub.pace import Pace
from workers.scrub.subject import Fault, Held
from workers.shard import FORMAT, POSITION, SLOTS, new_generator, numbers, overtaken, xapian

POSTINGS = 16
"""Words of a document that are looked up, chosen anew each time. All of them would take ten times as long, and damage
to a table hits many documents: sooner or later one of its words is among those."""

SLICE = 500
"""Documents read between two looks whether the shard has moved on."""

_T = TypeVar("_T")

_KEYS = "Q"


class _Claim(NamedTuple):
    """What a shard says of itself."""

    slots: Slots
    #: Whether its documents were made as this version makes them.
    ours: bool


class IndexSubject:
    """All shards of an index."""

    target = "index"
    advice = stray_advice = "build the index anew: outbox resilver index"

    def __init__(self, directory: Path) -> None:
        """The generation that searches read. Raises `NotReady` if there is none."""
        self._directory = directory
        self._paths: dict[str, Path] = {}
        self._open: dict[str, Any] = {}
        self._claims: dict[str, _Claim] = {}
        self._generators: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        """From now on, read what is there now: a resilver may have put another generation in its place."""
        self.close()
        self._paths = {path.name: path for path in shards(self._directory)}

    def positions(self) -> dict[int, Position | None]:
        """What each shard says."""
        found: dict[int, Position | None] = {}
        for name in self._paths:
            with self._readable(name):
                text = self._read(name, lambda db: db.get_metadata(POSITION).decode())
                found[int(name)] = Position.parse(text) if text else None
        return found

    def held(self) -> Iterator[Held]:
        """Every document, also those that nobody could find by a key."""
        self._begin()
        for name in sorted(self._paths):
            after = 0
            while found := self._slice(name, after):
                after = int(found[-1].place.partition("/")[2])
                yield from found

    def look(self, seen: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        """Looked up by the term of the key; and where the inventory found one that this doesn't lead to."""
        self._begin()
        found: dict[str, list[Held]] = {}
        for key, before in seen.items():
            there = [held for name in sorted(self._paths) for held in self._under(name, key)]
            places = {held.place for held in there}
            lost = [held for held in before if held.place not in places and self.still(held)]
            there += [held._replace(fault="a search for its key does not find the document") for held in lost]
            if there:
                found[key] = there
        return found

    def still(self, stray: Held) -> bool:
        """Read it again."""
        name, _, number = stray.place.partition("/")
        if name not in self._paths:
            return False
        try:
            return self._placed(self._read(name, partial(_held, shard=name, number=int(number)))) == stray
        except xapian.DocNotFoundError:
            return False

    def size(self, intent: Intent) -> int:
        """The log has it all."""
        return len(intent.body)

    def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
        """Make the document anew, and compare."""
        pace.spend(0, len(intent.body))
        name, _, number = held.place.partition("/")
        try:
            return self._read(name, lambda db: self._fault(db, int(number), intent, held))
        except (xapian.DatabaseError, xapian.DocNotFoundError) as error:
            return Fault("corrupt", f"the document can't be read ({type(error).__name__})")

    def repair(self, kind: Kind) -> Repair:
        """The last document of a key replaces all that are there."""
        return "delete" if kind == "orphaned" else "put"

    def close(self) -> None:
        """Let go of the shards."""
        for db in self._open.values():
            db.close()
        self._open.clear()
        self._claims.clear()

    def _fault(self, db: Any, number: int, intent: Intent, held: Held) -> Fault | None:
        stored = db.get_document(number)
        if _record(stored).get("digest") != sha256(intent.body.encode()).hexdigest():
            if held.id < intent.id:
                return Fault("stale", f"the document is of intent {held.id}, and {intent.id} came after it")
            return Fault("corrupt", f"the document is not what intent {intent.id} says")
        try:
            # Put twice with one content, it may bear the name of either.
            put = ready(intent._replace(id=held.id))
        except Permanent:
            put = None
        if put is None:
            return Fault("corrupt", "the document is of an intent that can't be indexed")
        language = put.content.language
        if language not in self._generators:
            self._generators[language] = new_generator(language)
        made = document_of(put, key_term(intent.key), self._generators[language])
        # Another version may have made other words of the same text.
        whole = self._claim(held.place).ours
        if made.get_data() != stored.get_data() or (whole and made.serialise() != stored.serialise()):
            return Fault("corrupt", f"the document's words or its record are not what intent {intent.id} says")
        return _unfindable(db, number, stored, key_term(intent.key))

    def _slice(self, name: str, after: int) -> list[Held]:
        with self._readable(name):
            return list(map(self._placed, self._read(name, partial(_slice, shard=name, after=after))))

    def _under(self, name: str, key: str) -> list[Held]:
        with self._readable(name):
            return list(map(self._placed, self._read(name, partial(_under, shard=name, key=key))))

    def _claim(self, place: str) -> _Claim:
        name = place.partition("/")[0]
        if name not in self._claims:
            self._claims[name] = self._read(name, _claim)
        return self._claims[name]

    def _placed(self, held: Held) -> Held:
        """With a word about it if its shard is not for its key: no intent removes it from there."""
        slots = self._claim(held.place).slots
        if not held.key or slots.low <= slot_of(held.key) <= slots.high:
            return held
        return held._replace(fault="the document is in a shard that is not for its key")

    def _read(self, name: str, reading: Callable[[Any], _T]) -> _T:
        """Read a shard; again, when its writer has overtaken us."""
        for _ in range(TRIES):
            db = self._database(name)
            try:
                return reading(db)
            except (xapian.DatabaseModifiedError, xapian.DatabaseCorruptError) as error:
                overtaken(db, error)
        raise Unavailable(f"the index shard {self._paths[name]} changes faster than it can be read: scrub with a rate")

    def _database(self, name: str) -> Any:
        if name not in self._open:
            with self._readable(name):
                self._open[name] = xapian.Database(str(self._paths[name]))
        return self._open[name]

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Inside, what can't be read leaves nothing to compare."""
        try:
            yield
        except (xapian.DatabaseError, ValueError) as error:
            raise Unavailable(
                f"the index shard {self._paths[name]} can't be read ({type(error).__name__}): see to its disk, "
                "or build it anew with `outbox resilver index`"
            ) from error


def slot_of(key: str) -> int:
    """As `outbox.slot` in the database."""
    return int(md5(key.encode(), usedforsecurity=False).hexdigest()[:4], 16) & 16383


def _claim(db: Any) -> _Claim:
    low, _, high = db.get_metadata(SLOTS).decode().partition("-")
    made_as = db.get_metadata(FORMAT).decode()
    return _Claim(Slots(int(low), int(high)) if high else Slots(), made_as in ("", format_of_documents()))


def _slice(db: Any, shard: str, after: int) -> list[Held]:
    found: list[Held] = []
    for number in numbers(db, after):
        found.append(_held(db, shard, number))
        if len(found) == SLICE:
            break
    return found


def _under(db: Any, shard: str, key: str) -> list[Held]:
    return [_held(db, shard, posting.docid) for posting in db.postlist(key_term(key))]


def _held(db: Any, shard: str, number: int) -> Held:
    """One document. Its key is what its term says: by that it is replaced."""
    place = f"{shard}/{number}"
    try:
        doc = db.get_document(number)
        record, term = _record(doc), _key_term(doc)
    except xapian.DatabaseError as error:
        if db.reopen() or isinstance(error, xapian.DatabaseModifiedError):
            raise xapian.DatabaseModifiedError("a newer commit has written over it") from error
        return Held("", 0, place, f"the document can't be read ({type(error).__name__})")
    key, id_ = record.get("key"), record.get("id")
    id_ = id_ if isinstance(id_, int) else 0
    if isinstance(key, str) and term == key_term(key).encode():
        return Held(key, id_, place)
    if not term:
        return Held("", id_, place, "the document has no key, so that nothing replaces it")
    if len(term) >= TERM_LIMIT:
        return Held("", id_, place, "the document's record is not of its key")
    return Held(term[1:].decode("utf-8", "replace"), id_, place, "the document's record is not of its key")


def _record(doc: Any) -> dict[str, Any]:
    try:
        record = json.loads(doc.get_data())
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _key_term(doc: Any) -> bytes:
    terms = doc.termlist()
    try:
        found: bytes = terms.skip_to(_KEYS).term
    except StopIteration:
        return b""
    return found if found.startswith(_KEYS.encode()) else b""


def _unfindable(db: Any, number: int, doc: Any, unique: str) -> Fault | None:
    """Whether a search for one of its terms would miss it."""
    terms = [item.term for item in doc.termlist()]
    for term in [unique, *random.sample(terms, min(POSTINGS, len(terms)))]:
        postings = db.postlist(term)
        try:
            if postings.skip_to(number).docid == number:
                continue
        except StopIteration:
            pass
        return Fault("corrupt", "the document is not found by its own words")
    return None
