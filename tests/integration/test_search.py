"""Searching what the index participant wrote: queries, filters, snippets, paging, the command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from outbox import quiet
from outbox import search as searching
from outbox.cli import main
from outbox.document import document
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.participant import LaneView
from outbox.search import Index, QueryInvalid, search
from workers.index import IndexParticipant
from workers.shard import xapian

LONG = "a value that is longer than any term " * 10

BOOKS: dict[str, dict[str, Any]] = {
    "book/1": {
        "title": "Annual Report",
        "text": "The librarian wrote a report about <books> & readers. " + "Filler words follow here. " * 20,
        "keywords": {"folder": "lib", "tag": ["red", "two words"]},
        "data": {"url": "/1"},
    },
    "book/2": {
        "title": "Summary",
        "text": "An overview of the annual budget; the Report is elsewhere.",
        "keywords": {"folder": "lib", "tag": "blue"},
    },
    "book/3": {"title": "Dragons", "text": "Here be dragons, and books of them.", "keywords": {"folder": "Lib"}},
    "book/4": {"title": "Dragons", "text": "A second volume.", "keywords": {"folder": "zip", "path": LONG}},
    "book/5": {"title": "東京", "text": "東京都の図書館"},
}


def write(directory: Path, lane: int, contents: dict[str, dict[str, Any]], *, first: int = 1) -> None:
    participant = IndexParticipant(directory)
    participant.open(LaneView("index", lane, 1, unclean=False))
    try:
        participant.apply(
            [
                Intent.make("index", "put", key, document(**content))._replace(id=number)
                for number, (key, content) in enumerate(contents.items(), first)
            ],
            None,
        )
    finally:
        participant.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two shards."""
    directory = tmp_path_factory.mktemp("library") / "index"
    for lane in range(2):
        write(directory, lane, {key: BOOKS[key] for n, key in enumerate(BOOKS) if n % 2 == lane}, first=100 * lane)
    return directory


@pytest.fixture
def index(library: Path) -> Iterator[Index]:
    with Index(library) as opened:
        yield opened


def keys(index: Index, query: str, **options: Any) -> list[str]:
    return sorted(hit.key for hit in index.search(query, **options).hits)


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("report", "12"),
        ("REPORTS", "12"),
        ("Librarians OR Dragon", "134"),
        ("report librarian", "1"),
        ("report OR dragons", "1234"),
        ("report AND NOT librarian", "2"),
        ("report -librarian", "2"),
        ("NOT report", "345"),
        ("(report OR dragon) book", "13"),
        ('"annual report"', "1"),
        ('"annual budget"', "2"),
        # No phrase reaches from the title into the text.
        ('"report the librarian"', ""),
        ("libr*", "1"),
        ("title:report", "1"),
        ("title:Reports", "1"),
        ("folder:lib", "12"),
        ("folder:Lib", "3"),
        ("folder:lib folder:zip", "124"),
        ("folder:lib tag:blue", "2"),
        ("folder:lib dragons", ""),
        ('tag:"two words"', "1"),
        (f'path:"{LONG}"', "4"),
        ("key:book/3", "3"),
        ("東京", "5"),
        ("", "12345"),
        ("  ", "12345"),
        ("nothing", ""),
        ("report folder:nowhere", ""),
        ("unknown:report", ""),
        ("((report", "12"),
        ('"', ""),
        ("x" * 1000, ""),
    ],
)
def test_search_finds_what_the_query_says(index: Index, query: str, numbers: str) -> None:
    assert keys(index, query) == [f"book/{number}" for number in numbers]


@pytest.mark.parametrize("query", ["report AND", "AND", "OR OR", "\ud800"])
def test_search_says_so_when_the_query_can_not_be_read(index: Index, query: str) -> None:
    with pytest.raises(QueryInvalid, match="query"):
        index.search(query)


def test_search_filters_by_any_value(index: Index) -> None:
    assert keys(index, "", filters={"folder": "lib"}) == ["book/1", "book/2"]
    assert keys(index, "report", filters={"folder": ["lib", "zip"], "tag": "two words"}) == ["book/1"]
    assert keys(index, "", filters={"path": LONG}) == ["book/4"]
    assert keys(index, "", filters={"folder": []}) == []
    assert keys(index, "", filters={"nowhere": "x"}) == []
    with pytest.raises(QueryInvalid):
        index.search("", filters={"No Field": "x"})


def test_search_gives_back_what_was_stored(index: Index) -> None:
    (hit,) = index.search("librarian").hits
    assert (hit.key, hit.title, hit.data, hit.id) == ("book/1", "Annual Report", {"url": "/1"}, 0)
    assert hit.score > 0


def test_search_ranks_the_title_above_the_text(index: Index) -> None:
    assert [hit.key for hit in index.search("report").hits] == ["book/1", "book/2"]


def test_search_shows_where_it_was_found_in_plain_text(index: Index) -> None:
    (hit,) = index.search("books librarian").hits
    assert "**librarian** wrote a report about <**books**> & readers." in hit.snippet
    assert len(hit.snippet) < 250
    (hit,) = index.search("books librarian", highlight=("[", "]"), width=60).hits
    assert "<[books]> &" in hit.snippet
    assert len(hit.snippet) < 80


def test_search_escapes_the_snippet_when_it_goes_into_html(index: Index) -> None:
    (hit,) = index.search("books librarian", escape=True, highlight=("<b>", "</b>")).hits
    assert "&lt;<b>books</b>&gt; &amp;" in hit.snippet
    (hit,) = index.search("title:annual", escape=True).hits
    assert "&lt;books&gt;" in hit.snippet


def test_search_shows_the_beginning_when_only_the_title_matches(index: Index) -> None:
    (hit,) = index.search("title:annual", width=30).hits
    assert hit.snippet == "The librarian wrote a report…"
    (hit,) = index.search("title:summary").hits
    assert hit.snippet == BOOKS["book/2"]["text"]


def test_search_pages_without_overlap(index: Index) -> None:
    pages = [index.search("", limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [len(page.hits) for page in pages] == [2, 2, 1, 0]
    assert {page.matches for page in pages} == {5}
    assert all(page.exact for page in pages)
    assert sorted(hit.key for page in pages for hit in page.hits) == sorted(BOOKS)
    assert index.search("", limit=0) == (5, True, [], None)
    with pytest.raises(QueryInvalid):
        index.search("", offset=-1)


@pytest.mark.parametrize(
    ("query", "corrected"),
    [
        ("librarain report", "librarian report"),
        ("Librarain", "librarian"),
        ("ilbrarian", "librarian"),
        ("lbrarian", "librarian"),
        ("llibrarain", "librarian"),
        ("budhet OR (dragns -volme)", "budget OR (dragons -volume)"),
        # Neither filters nor phrases nor beginnings of words are corrected.
        ('report folder:libb "anual" libbr*', None),
        # Not a word of the index, but its stem is.
        ("librarians", None),
        # Would find nothing either.
        ("librarain folder:zip", None),
        ("xyzzyx", None),
        ("rep", None),
    ],
)
def test_search_corrects_the_spelling_when_that_finds_more(index: Index, query: str, corrected: str | None) -> None:
    assert index.search(query).corrected == corrected


def test_search_suggests_the_most_frequent_of_similar_words(tmp_path: Path) -> None:
    texts = ["house", "mouse", "horse", "horse", "horde"]
    write(tmp_path, 0, {f"k{n}": {"text": text} for n, text in enumerate(texts)})
    with Index(tmp_path) as index:
        assert index.search("hoqse").corrected == "horse"


def test_search_stems_in_the_language_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 0, {"d": {"text": "die Häuser", "language": "de"}, "n": {"text": "Häuser", "language": "none"}})
    with Index(tmp_path) as index:
        assert keys(index, "Haus", language="de") == ["d"]
        assert keys(index, "häuser", language="none") == ["d", "n"]
        with pytest.raises(QueryInvalid):
            index.search("x", language="klingon")


def test_index_get_finds_the_document_of_a_key(index: Index) -> None:
    found = index.get("book/2")
    assert found is not None
    assert (found.title, found.snippet) == ("Summary", BOOKS["book/2"]["text"])
    assert index.get("book/99") is None


def test_index_sees_every_commit_when_it_stays_open(tmp_path: Path) -> None:
    participant = IndexParticipant(tmp_path)
    participant.open(LaneView("index", 0, 1, unclean=False))
    with Index(tmp_path) as index:
        for number in range(5):
            intents = [Intent.make("index", "put", f"k{number}", document(text="word", keywords={f"f{number}": "x"}))]
            participant.apply(intents, None)
            participant.apply(intents, None)
            assert index.search("word").matches == number + 1
            assert index.search(f"f{number}:x").matches == 1
    participant.close()


def test_index_runs_the_query_again_when_the_writer_overtakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reader and writer are one thread here, which can't wait for itself.
    monkeypatch.setattr(quiet, "PATIENCE", 0.01)
    participant = IndexParticipant(tmp_path)
    participant.open(LaneView("index", 0, 1, unclean=False))
    chance = random.Random(1)

    def commit() -> None:
        # Data that doesn't compress, so that not all of it is in memory when the query comes to it.
        participant.apply(
            [
                Intent.make("index", "put", f"k{n}", document(data={"noise": chance.randbytes(3000).hex()}))
                for n in range(20)
            ],
            None,
        )

    commit()
    parse, overtakes = searching._parse, 0

    def overtake(*args: Any) -> Any:
        nonlocal overtakes
        overtakes += 1
        if overtakes <= limit:
            for _ in range(3):
                commit()
        return parse(*args)

    monkeypatch.setattr(searching, "_parse", overtake)
    with Index(tmp_path) as index:
        limit = 2
        assert len(index.search("", limit=20).hits) == 20
        assert overtakes == limit + 1
        limit = 1000
        with pytest.raises(NotReady, match="try again"):
            index.search("", limit=20)
    participant.close()


def test_index_sees_a_shard_that_is_new_or_was_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "index"
    write(directory, 0, {"a": {"text": "word"}})
    with Index(directory) as index:
        assert keys(index, "word") == ["a"]
        write(directory, 1, {"b": {"text": "word"}})
        assert keys(index, "word") == ["a", "b"]
        write(tmp_path / "other", 0, {"c": {"text": "word"}})
        (directory / "00").rename(tmp_path / "old")
        (tmp_path / "other" / "00").rename(directory / "00")
        assert keys(index, "word") == ["b", "c"]


def test_index_is_not_ready_when_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(NotReady, match="outbox up"):
            search(directory, "word")
        index = Index(directory)
        with pytest.raises(NotReady, match="outbox up"):
            index.get("k")
    # It needs no restart when the index comes.
    write(tmp_path / "empty", 0, {"k": {"text": "word"}})
    assert index.get("k") is not None
    index.close()


def test_index_is_not_ready_when_a_shard_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, 0, {"a": {"text": "word"}})
    (tmp_path / "00" / "iamglass").write_bytes(b"no version file")
    with pytest.raises(NotReady, match="can't be read"):
        search(tmp_path, "word")


@pytest.mark.parametrize("times", [1, searching.TRIES])
def test_search_asks_again_when_a_block_looks_damaged_because_a_commit_has_written_over_it(
    library: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    # Given what Xapian says of a block that belongs to another commit by now: once, or whenever it is asked
    left = iter(range(times))
    refresh = Index._refresh

    def overwritten(index: Index) -> None:
        if next(left, None) is not None:
            raise xapian.DatabaseCorruptError("Expected block 5 to be level 1, not 0")
        refresh(index)

    asked: list[Path] = []

    def reading(folders: Iterable[Path]) -> AbstractContextManager[None]:
        asked.extend(folders)
        return quiet.reading(asked)

    monkeypatch.setattr(Index, "_refresh", overwritten)
    monkeypatch.setattr(searching, "reading", reading)
    with Index(library) as index:
        if times == 1:
            assert index.search("dragon").hits
            # ... and the writers of both shards were asked to wait
            assert asked == searching.shards(library)
        else:
            with pytest.raises(NotReady, match="DatabaseCorruptError"):
                index.search("dragon")


def test_search_says_what_to_install_when_xapian_is_missing(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "xapian", None)
    with pytest.raises(NotReady, match="python3-xapian"):
        search(library, "word")


def test_outbox_does_not_load_xapian_when_it_is_imported() -> None:
    code = "import sys, outbox, outbox.document, outbox.cli; sys.exit('xapian' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -------------------------------------------------------------------------------------------- the command


@pytest.fixture
def configured(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only OUTBOX_INDEX is set: no database, no state directory."""
    monkeypatch.delenv("OUTBOX_DATABASE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_INDEX", str(library))


def test_command_prints_hits_for_people(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "librarian", "report"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1-1 of 1:")
    assert "1. Annual Report  [book/1]" in out
    assert "librarian wrote a report about <books> & readers." in out
    assert "Did you mean" not in out


def test_command_pages(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "", "--limit", "2", "--page", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3-4 of 5:")
    assert "  4. " in out
    assert "More with --page." in out
    assert main(["search", "", "--page", "2"]) == 0
    assert "5 before it" in capsys.readouterr().out


def test_command_prints_one_json_object(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "report", "--filter", "tag=two words", "--filter", "tag=none", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["query", "matches", "page", "hits", "corrected"]
    assert (result["query"], result["matches"], result["page"], result["corrected"]) == ("report", 1, 1, None)
    (hit,) = result["hits"]
    assert (hit["key"], hit["title"], hit["data"], hit["id"]) == ("book/1", "Annual Report", {"url": "/1"}, 0)
    assert "**report**" in hit["snippet"]


def test_command_suggests_when_nothing_matches(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "librarain"]) == 0
    assert capsys.readouterr().out == "No match.\nDid you mean: librarian?\n"


def test_command_keeps_the_terminal_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 0, {"k\x1b[2J": {"title": "bad\x1b]0;title\x07", "text": "some \x1b[31m word \x9b"}})
    monkeypatch.setenv("OUTBOX_INDEX", str(tmp_path))
    assert main(["search", "word"]) == 0
    assert not {"\x1b", "\x07", "\x9b", "\x02"} & set(capsys.readouterr().out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["search", "word"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[1mword\x1b[0m" in out
    assert "\x1b[31m" not in out


@pytest.mark.parametrize("wrong", [["--limit", "0"], ["--page", "x"], ["--filter", "tag"], ["--filter", "=x"]])
def test_command_exits_with_2_when_it_is_used_wrongly(configured: None, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["search", "word", *wrong])
    assert caught.value.code == 2


def test_command_prints_one_sentence_when_it_fails(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "report AND"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("outbox search: the query can't be read")


def test_command_says_what_to_do_when_there_is_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_INDEX", str(tmp_path / "missing"))
    assert main(["search", "word"]) == 1
    assert "outbox up" in capsys.readouterr().err
    monkeypatch.delenv("OUTBOX_INDEX")
    monkeypatch.delenv("OUTBOX_DATABASE", raising=False)
    assert main(["search", "word", "--state", str(tmp_path)]) == 1
    assert "outbox up" in capsys.readouterr().err
