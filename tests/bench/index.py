"""`index`: the index participant behind the real reader, against Xapian alone.

Xapian alone means: the same documents with the same terms and the same stored data, lying ready in memory, in as many
commits, each followed by the same fsync of the directory. It reads no log, parses no payload, keeps no position
and notes no words for spelling. Both begin with a new index each time.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NamedTuple

from outbox import sql
from outbox.document import TITLE, document, key_term
from outbox.intent import Intent
from outbox.log import append_parameters
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import Rig, drain, rig
from tests.bench.site import Site
from workers.index import TITLE_WEIGHT, IndexParticipant
from workers.shard import xapian

DOCUMENTS = 3000
COMMIT = IndexParticipant.batch_limit
SIZE = 980
"""Bytes of a payload. A little more, and the reader would cut a commit of 1,000 by its bytes."""

_ONSETS = ("b", "c", "ch", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "sh", "st", "t", "th", "w", "y")
_VOWELS = ("a", "e", "i", "o", "u", "ea", "ou", "ai", "ee")
_CODAS = ("", "n", "r", "s", "t", "l", "ck", "nd", "ng", "m", "st")
_SYLLABLES = ["".join(parts) for parts in product(_ONSETS, _VOWELS, _CODAS)]


class Plain(NamedTuple):
    """A document as the bare loop takes it."""

    term: str
    title: str
    text: str
    data: bytes


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Documents a second."""
    made_up = list(documents(DOCUMENTS))
    with rig(site, "index") as made:
        emit(made, made_up)
        made.tick()
        plain_ones = _as_stored(made, site.folder(), made_up)

        def reader() -> float:
            folder = site.folder()
            took = _participant(made, folder)
            shutil.rmtree(folder)
            return len(plain_ones) / took

        def bare() -> float:
            folder = site.folder()
            took = build(folder, plain_ones)
            shutil.rmtree(folder)
            return len(plain_ones) / took

        # Both sides have run once already, when the documents were read back.
        pair = compare(reader, bare, pairs=2 if quick else 5, warm=False)
    yield Figure("index.ratio", pair.ratio, "ratio of documents/s", Bar(">=", 0.9))
    yield Figure("index.reader", pair.ours, "documents/s")
    yield Figure("index.xapian", pair.theirs, "documents/s")


def _participant(made: Rig, folder: Path) -> float:
    with made.reader(IndexParticipant(folder)) as reader:
        start = time.perf_counter()
        reader.open()
        drain(reader)
        took = time.perf_counter() - start
    # What is parked takes no time.
    written = xapian.Database(str(folder / "00"))
    found = written.get_doccount()
    written.close()
    if found != DOCUMENTS:
        raise RuntimeError(f"the index has {found:,} documents of {DOCUMENTS:,}: see the messages above")
    return took


def build(folder: Path, plain: list[Plain], commit: int = COMMIT) -> float:
    """Xapian alone. → seconds."""
    start = time.perf_counter()
    folder.mkdir()
    db = xapian.WritableDatabase(str(folder), xapian.DB_CREATE_OR_OPEN)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    generator = xapian.TermGenerator()
    generator.set_stemmer(xapian.Stem("en"))
    generator.set_flags(xapian.TermGenerator.FLAG_CJK_NGRAM)
    for first in range(0, len(plain), commit):
        db.begin_transaction()
        for term, title, text, data in plain[first : first + commit]:
            doc = xapian.Document()
            doc.set_data(data)
            doc.add_boolean_term(term)
            generator.set_document(doc)
            generator.index_text(title, 1, TITLE)
            generator.index_text(title, TITLE_WEIGHT)
            generator.increase_termpos()
            generator.index_text(text)
            db.replace_document(term, doc)
        db.commit_transaction()
        os.fsync(directory)
    db.close()
    os.close(directory)
    return time.perf_counter() - start


def _as_stored(made: Rig, folder: Path, documents: list[tuple[str, dict[str, Any]]]) -> list[Plain]:
    """The documents with the data that the participant stores; makes sure that both sides write the same terms."""
    _participant(made, folder)
    made_plain = plain(folder / "00", documents)
    ours = xapian.Database(str(folder / "00"))
    beside = folder / "bare"
    build(beside, made_plain)
    theirs = xapian.Database(str(beside))
    for number in (1, len(made_plain) // 2, len(made_plain)):
        if _terms(ours, number) != _terms(theirs, number):
            raise RuntimeError(f"the two indexes differ in document {number}: make the bare loop do the same")
    if (ours.get_doccount(), ours.get_avlength()) != (theirs.get_doccount(), theirs.get_avlength()):
        raise RuntimeError("the two indexes differ: make the bare loop do the same")
    ours.close()
    theirs.close()
    shutil.rmtree(folder)
    return made_plain


def plain(shard: Path, documents: list[tuple[str, dict[str, Any]]]) -> list[Plain]:
    """The documents with what the participant has stored with them."""
    db = xapian.Database(str(shard))
    found = [
        Plain(key_term(key), payload["title"], payload["text"], db.get_document(number).get_data())
        for number, (key, payload) in enumerate(documents, 1)
    ]
    db.close()
    return found


def _terms(db: Any, number: int) -> list[tuple[bytes, int]]:
    return [(item.term, item.wdf) for item in db.get_document(number).termlist()]


def documents(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys and payloads. The words are made up, but as many and as unevenly used as those of English."""
    rng = random.Random(1)
    words = sorted({"".join(rng.choices(_SYLLABLES, k=rng.choice((1, 2, 2, 3, 3)))) for _ in range(30_000)})
    # Zipf's law, and the most frequent words are short ones.
    words.sort(key=lambda word: len(word) + rng.gauss(0, 2))
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    for number in range(count):
        title = " ".join(rng.choices(words, cum_weights=weights, k=4)).capitalize()
        text = " ".join(rng.choices(words, cum_weights=weights, k=SIZE // 3))
        made = document(title=title, text=text)
        surplus = len(Intent.make("index", "put", "key", made).body) - SIZE
        yield f"note/{number}", document(title=title, text=text[:-surplus])


def emit(made: Rig, documents: list[tuple[str, dict[str, Any]]]) -> None:
    """Into the log, in few transactions."""
    intents = [Intent.make("index", "put", key, payload) for key, payload in documents]
    for first in range(0, len(intents), 10_000):
        made.admin.execute(sql.load("log_append"), append_parameters(intents[first : first + 10_000]))
