"""What an index intent's payload may be, and which terms stand for keys and keywords."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.document import LANGUAGES, TERM_LIMIT, Content, document, key_term, prefix, term
from outbox.errors import PayloadInvalid, Permanent
from outbox.intent import Intent


def test_document_leaves_out_what_is_empty() -> None:
    assert document() == {}
    assert document(title="", keywords={}, data={}) == {}
    assert document(keywords={"tag": []}) == {}
    assert document(text="words", keywords={"tag": "a", "folder": ("b", "c")}, data={"n": 1}, language="de") == {
        "text": "words",
        "keywords": {"tag": ["a"], "folder": ["b", "c"]},
        "data": {"n": 1},
        "language": "de",
    }


def test_document_is_a_payload_that_the_worker_reads_back() -> None:
    payload = document(title="T", text="words", keywords={"tag": "a"}, data={"n": [1]})
    intent = Intent.make("index", "put", "k", payload)
    assert Content.of(intent.payload) == ("T", "words", {"tag": ["a"]}, {"n": [1]}, "en")


@pytest.mark.parametrize(
    "wrong",
    [
        {"title": 1},
        {"text": b"bytes"},
        {"keywords": ["a"]},
        {"keywords": {"tag": 5}},
        {"keywords": {"tag": ["a", 5]}},
        {"keywords": {"tag": ["a", ""]}},
        {"keywords": {"Tag": "a"}},
        {"keywords": {"ta g": "a"}},
        {"keywords": {"": "a"}},
        {"keywords": {"t" * 64: "a"}},
        {"keywords": {"title": "a"}},
        {"keywords": {"key": "a"}},
        {"keywords": {5: "a"}},
        {"data": [1]},
        {"language": "klingon"},
        {"language": None},
        {"language": ["en"]},
    ],
)
def test_document_says_what_is_wrong_when_it_can_not_be_indexed(wrong: dict[str, Any]) -> None:
    with pytest.raises(PayloadInvalid) as caught:
        document(**wrong)
    # One sentence, and what to do; never the payload.
    assert ": " in str(caught.value)
    assert "klingon" not in str(caught.value)
    assert isinstance(caught.value, Permanent)


@pytest.mark.parametrize("payload", [None, [], "text", {"tittle": "x"}, {"keywords": {"tag": {}}}, {"text": None}])
def test_content_refuses_what_did_not_come_from_document(payload: Any) -> None:
    with pytest.raises(PayloadInvalid):
        Content.of(payload)


def test_content_takes_a_single_keyword_written_in_sql() -> None:
    assert Content.of({"keywords": {"tag": "a"}}).keywords == {"tag": ["a"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_document_takes_every_language(language: str) -> None:
    assert Content.of(document(language=language)).language == language


def test_prefix_is_upper_case_and_ends_the_field() -> None:
    assert prefix("folder") == "XFOLDER:"
    assert term("folder", "Lib") == "XFOLDER:Lib"
    assert key_term("book/1") == "Qbook/1"
    with pytest.raises(PayloadInvalid):
        prefix("Folder")


def test_term_is_hashed_when_it_is_too_long() -> None:
    assert term("tag", "x" * 239) == "XTAG:" + "x" * 239
    longer, other = term("tag", "x" * 240), term("tag", "x" * 239 + "y")
    assert len(longer) == len(other) == TERM_LIMIT
    assert longer != other
    assert longer.startswith("XTAG:#")
    # 512 bytes of key are allowed in the log.
    assert len(key_term("é" * 256).encode()) == TERM_LIMIT


@given(st.text(max_size=300), st.sampled_from(["a", "f" * 63]))
def test_term_fits_into_xapian_whatever_the_value_is(value: str, field: str) -> None:
    for made in (term(field, value), key_term(value)):
        encoded = made.encode("utf-8", "surrogatepass")
        assert len(encoded) + encoded.count(b"\x00") <= TERM_LIMIT


@given(st.text(max_size=260), st.text(max_size=260))
def test_term_is_different_when_the_value_is(one: str, other: str) -> None:
    assert (key_term(one) == key_term(other)) == (one == other)


def test_term_of_a_value_that_looks_like_a_hash_is_its_own() -> None:
    hashed = key_term("x" * 300)
    assert key_term(hashed[1:]) != hashed
