"""Search: how an application queries the index that the workers fill.

    from outbox.search import Index

    with Index(settings.index) as index:
        found = index.search("annual report folder:lib", limit=20)

An application keeps one `Index` open; the function `search` opens and closes one for a single query. Every
call sees the newest commit of the workers. Nothing here is written, and no database is needed.

A query is words, which are stemmed and must all occur, and:

    "annual report"       a phrase
    report OR summary     either; AND and NOT as well, and ( )
    report -draft         without a word; +report insists on one
    libr*                 words that begin so
    title:report          in the title only
    folder:lib            a keyword field has exactly this value (`folder:"two words"`); several values of a
                          field are alternatives, several fields must all fit
    key:book/7            the document of a key

An empty query finds everything. Operators are in capitals.

Threads: an `Index` may be shared, its calls take turns; for parallel queries use one for each thread. Forking:
open it after the fork.

Errors: `NotReady` when there is no index, or no Xapian; `QueryInvalid` for a query that can't be read.

This is the only module of the package that imports Xapian, and nothing imports it for you.
"""

from __future__ import annotations

import html
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self, TypeVar

from outbox import generation
from outbox.document import LANGUAGES, TITLE, key_term, prefix, term
from outbox.errors import NotReady, OutboxError, PayloadInvalid
from outbox.quiet import reading
from outbox.settings import required
from outbox.spelling import suggest

try:
    with warnings.catch_warnings():
        # SWIG's types have no __module__, which newer Pythons deprecate.
        warnings.simplefilter("ignore", DeprecationWarning)
        import xapian
except ImportError:
    xapian = None

T = TypeVar("T")

FIELDS = "outbox.fields"
"""Name of the metadata in which the workers note the keyword fields, separated by spaces."""

EXACT = 1000
"""Up to so many matches are counted, more are estimated."""

TRIES = 10
"""Commits of the workers can invalidate what a query is reading; it is then run again, so often at most, and the
workers wait for it (`outbox.quiet`)."""

WILDCARD = 200
"""A wildcard stands for so many words at most: the most frequent ones."""

_SHARD = re.compile(r"\d{2,}")
# What of a query keeps its case: operators, phrases, values of fields. Xapian takes other words with a capital for
# names and doesn't stem them, which is wrong at the start of a sentence and for all German nouns.
_AS_IS = re.compile(r"""\b(?:AND|OR|NOT|XOR|NEAR|ADJ)\b|"[^"]*"|\b(?!title:)[a-z][a-z0-9_]*:(?:"[^"]*"|[^\s()"]+)""")
# A word that can be misspelt: in letters, no name of a field, no beginning of one.
_WORD = re.compile(r"(?<![\w:])[^\W\d_]{4,64}(?![\w:*])")
# What Xapian marks a word with before the text is unescaped; not in any text that a person wrote.
_MARKS = ("\x02", "\x03")


class QueryInvalid(OutboxError):
    """The query can't be read; the text says why."""


class Hit(NamedTuple):
    """One document found."""

    key: str
    #: Relevance, in the order of the hits; it compares within one query only.
    score: float
    title: str
    #: The part of the text that shows the words found, marked.
    snippet: str
    #: What the application stored with the document.
    data: dict[str, Any]
    #: The intent that wrote the document.
    id: int


class Results(NamedTuple):
    """What a query found."""

    #: How many documents match, on all pages.
    matches: int
    #: False: `matches` is an estimate.
    exact: bool
    #: Those asked for, best first.
    hits: list[Hit]
    #: The query with its spelling corrected, if that finds more (see `outbox.spelling`).
    corrected: str | None


def shards(directory: Path) -> list[Path]:
    """The shards of an index, in order: those of the generation in use. Raises `NotReady` if there is none."""
    while True:
        number = generation.current(directory)
        place = generation.folder(directory, number)
        try:
            names = sorted(filter(_SHARD.fullmatch, os.listdir(place)))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        found = [place / name for name in names if (place / name / "iamglass").exists()]
        # One that is being removed is not whole, and there is a newer one by then.
        if generation.current(directory) == number:
            break
    if not found:
        raise NotReady(
            f"there is no index in {directory}: start its worker with `outbox up` or `outbox work index`, "
            "or set OUTBOX_INDEX to where it is"
        )
    return found


class Index:
    """An index, open for queries."""

    def __init__(self, directory: str | Path | None) -> None:
        """Opens nothing yet, so that an application can start before its workers do."""
        self._directory = required(None if directory is None else Path(directory), "OUTBOX_INDEX")
        self._lock = Lock()
        self._identity: list[tuple[Path, int]] = []
        self._uuids: list[bytes] = []
        self._shards: list[Any] = []
        self._database: Any = None

    def search(
        self,
        query: str,
        *,
        limit: int = 10,
        offset: int = 0,
        filters: Mapping[str, str | Sequence[str]] | None = None,
        language: str = "en",
        highlight: tuple[str, str] = ("**", "**"),
        escape: bool = False,
        width: int = 200,
    ) -> Results:
        """The best matches of a query, from `offset` on.

        `filters` maps keyword fields to values as `field:value` in the query does, with any characters.
        `language` is that of the query's words. Snippets are of about `width` characters, with the words found
        between the two `highlight` marks; plain text, or with `escape` ready to stand in HTML (the marks are not
        escaped: `("<b>", "</b>")`). Raises `NotReady`, `QueryInvalid`.
        """
        if limit < 0 or offset < 0:
            raise QueryInvalid("limit or offset is negative: count from 0")
        if language not in LANGUAGES:
            raise QueryInvalid(f"the language is not known: use one of {', '.join(LANGUAGES)}")

        def run(database: Any) -> Results:
            parser = self._parser(language)
            parsed = _parse(parser, query, filters)
            enquire = xapian.Enquire(database)
            enquire.set_query(parsed)
            found = enquire.get_mset(offset, limit, EXACT)
            snippet = _Snippet(found, xapian.Stem(language), highlight, width, escape=escape)
            hits = [_hit(match.document.get_data(), match.weight, snippet) for match in found]
            matches = found.get_matches_estimated()
            exact = found.get_matches_lower_bound() == found.get_matches_upper_bound()
            corrected = _corrected(database, query, xapian.Stem(language))
            if corrected is not None:
                # The words of another field or filter may have excluded everything anyway.
                enquire.set_query(_parse(parser, corrected, filters))
                if enquire.get_mset(0, 0, EXACT).get_matches_estimated() <= matches:
                    corrected = None
            return Results(matches, exact, hits, corrected)

        return self._read(run)

    def get(self, key: str) -> Hit | None:
        """The document of a key, or None. Its snippet is the beginning of its text. Raises `NotReady`."""

        def run(database: Any) -> Hit | None:
            for posting in database.postlist(key_term(key)):
                return _hit(database.get_document(posting.docid).get_data(), 0.0, _head)
            return None

        return self._read(run)

    def close(self) -> None:
        """Let go of the files. The index opens again when it is used."""
        with self._lock:
            self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, run: Callable[[Any], T]) -> T:
        """`run` on the newest state of the index."""
        if xapian is None:
            raise NotReady(
                "Xapian is not installed: pip install 'postgres-outbox[index]', "
                "or use Debian's Python with its python3-xapian"
            )
        with self._lock:
            for attempt in range(1, TRIES + 1):
                try:
                    # Who was overtaken asks the writers to wait a moment.
                    with reading(path for path, _ in self._look()) if attempt > 1 else nullcontext():
                        self._refresh()
                        return run(self._database)
                except xapian.DatabaseModifiedError as error:
                    # Overtaken by two commits.
                    if attempt == TRIES:
                        raise NotReady("the index changes faster than this query can read it: try again") from error
                except xapian.DatabaseError as error:
                    self._forget()
                    # A shard that is being made, or put in the place of another one, is there a moment later. And a
                    # block that a later commit has just written over looks damaged: the writers wait the next time.
                    passing = (xapian.DatabaseOpeningError, xapian.DatabaseCorruptError)
                    if attempt == TRIES or not isinstance(error, passing):
                        raise NotReady(
                            f"the index in {self._directory} can't be read ({type(error).__name__}): see to its disk "
                            "and who may read it; a damaged shard can be moved away, it is filled again from the log"
                        ) from error
        raise AssertionError

    def _refresh(self) -> None:
        """Open what is new, and move on to the newest commit."""
        identity = self._look()
        if identity == self._identity:
            self._database.reopen()
            # Files that were restored in place: Xapian goes by the revision, which can be the same.
            if [shard.get_uuid() for shard in self._shards] == self._uuids:
                return
        self._forget()
        opened = [xapian.Database(str(path)) for path, _ in identity]
        database = xapian.Database()
        for shard in opened:
            database.add_database(shard)
        self._identity, self._shards, self._database = identity, opened, database
        self._uuids = [shard.get_uuid() for shard in opened]

    def _look(self) -> list[tuple[Path, int]]:
        while True:
            try:
                return [(path, path.stat().st_ino) for path in shards(self._directory)]
            except FileNotFoundError:
                # Moved away, or of a generation that has just been replaced.
                continue

    def _forget(self) -> None:
        for shard in self._shards:
            shard.close()
        self._identity, self._shards, self._database = [], [], None

    def _parser(self, language: str) -> Any:
        parser = xapian.QueryParser()
        parser.set_database(self._database)
        parser.set_stemmer(xapian.Stem(language))
        parser.set_default_op(xapian.Query.OP_AND)
        parser.set_max_expansion(WILDCARD, xapian.Query.WILDCARD_LIMIT_MOST_FREQUENT)
        parser.add_prefix("title", TITLE)
        parser.add_boolean_prefix("key", _processor()(key_term))
        fields = {name for shard in self._shards for name in shard.get_metadata(FIELDS).decode().split()}
        for field in sorted(fields):
            parser.add_boolean_prefix(field, _processor()(partial(term, field)))
        return parser


def search(
    directory: str | Path | None,
    query: str,
    *,
    limit: int = 10,
    offset: int = 0,
    filters: Mapping[str, str | Sequence[str]] | None = None,
) -> Results:
    """One query to the index in `directory`. Raises as `Index.search` does, which has more options."""
    with Index(directory) as index:
        return index.search(query, limit=limit, offset=offset, filters=filters)


@cache
def _processor() -> Any:
    """The class of what turns `field:value` of a query into a term: long values are hashed."""

    class Processor(xapian.FieldProcessor):  # type: ignore[misc]  # xapian has no types
        def __init__(self, make: Callable[[str], str]) -> None:
            super().__init__()
            self._make = make

        def __call__(self, value: bytes) -> Any:
            return xapian.Query(self._make(value.decode()))

    return Processor


def _parse(parser: Any, query: str, filters: Mapping[str, str | Sequence[str]] | None) -> Any:
    kind = xapian.QueryParser
    flags = (
        kind.FLAG_BOOLEAN | kind.FLAG_PHRASE | kind.FLAG_LOVEHATE | kind.FLAG_WILDCARD | kind.FLAG_PURE_NOT
        | kind.FLAG_CJK_NGRAM
    )  # fmt: skip
    try:
        parsed = parser.parse_query(_words(query, str.lower), flags) if query.strip() else xapian.Query.MatchAll
    except xapian.QueryParserError as error:
        raise QueryInvalid(
            f"the query can't be read ({error}): quote the words that are not meant as operators"
        ) from error
    except UnicodeError as error:
        raise QueryInvalid("the query is not Unicode text: type it anew") from error
    for field, values in (filters or {}).items():
        wanted = [values] if isinstance(values, str) else values
        try:
            terms = [term(field, value) for value in wanted]
            prefix(field)
        except PayloadInvalid as error:
            raise QueryInvalid(f"a filter can't be used: {error}") from error
        parsed = xapian.Query(xapian.Query.OP_FILTER, parsed, xapian.Query(xapian.Query.OP_OR, terms))
    return parsed


def _words(query: str, change: Callable[[str], str]) -> str:
    """The query with `change` made to everything but what is to stay as it is."""
    parts, end = [], 0
    for keep in _AS_IS.finditer(query):
        parts += [change(query[end : keep.start()]), keep[0]]
        end = keep.end()
    return "".join([*parts, change(query[end:])])


def _corrected(database: Any, query: str, stem: Any) -> str | None:
    """The query with its unknown words replaced by similar ones, or None."""

    def correct(word: re.Match[str]) -> str:
        lower = word[0].lower()
        if database.term_exists(lower) or database.term_exists("Z" + stem(lower).decode()):
            return word[0]
        return suggest(database, lower) or word[0]

    corrected = _words(query, lambda part: _WORD.sub(correct, part))
    return corrected if corrected != query else None


def _hit(stored: bytes, score: float, snippet: Callable[[str], str]) -> Hit:
    record = json.loads(stored)
    return Hit(record["key"], score, record["title"], snippet(record["text"]), record["data"], record["id"])


class _Snippet:
    """Cuts out of a text what shows why it was found."""

    def __init__(self, found: Any, stem: Any, marks: tuple[str, str], width: int, *, escape: bool) -> None:
        self._found = found
        self._stem = stem
        self._marks = marks
        self._width = width
        self._escape = escape
        self._flags = found.SNIPPET_EXHAUSTIVE | found.SNIPPET_EMPTY_WITHOUT_MATCH | found.SNIPPET_CJK_NGRAM

    def __call__(self, text: str) -> str:
        # Xapian writes HTML.
        escaped = self._found.snippet(text, self._width, self._stem, self._flags, *_MARKS, "…").decode()
        if not escaped:
            head = _head(text, self._width)
            return html.escape(head) if self._escape else head
        shown = " ".join((escaped if self._escape else html.unescape(escaped)).split())
        return shown.replace(_MARKS[0], self._marks[0]).replace(_MARKS[1], self._marks[1])


def _head(text: str, width: int = 200) -> str:
    words = " ".join(text[: 2 * width].split())
    if len(words) <= width and len(text) <= 2 * width:
        return words
    head = words[:width]
    return (head.rpartition(" ")[0] or head) + "…"
