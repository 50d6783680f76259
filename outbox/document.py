"""The document: what the payload of an `index` intent says, and which terms stand for it in the index.

An application builds the payload with `document` and emits it; the worker reads it back with `Content.read`;
both apply the same checks, because intents can also come from `outbox.emit` in SQL. Nothing here does any
I/O or needs Xapian.

The payload, each member optional:

    title     text; shown with a hit, counts more than the text
    text      text; searched, and shown as a snippet
    keywords  {field: [value, …]}; exact values to filter by (`folder:lib`), of any length
    data      a dict; stored, and given back with a hit
    language  how words are stemmed: one of `LANGUAGES` (default `en`), or `none`

In the index, a value of a keyword field is the boolean term `X<FIELD>:<value>`, and the key of the document is
the unique term `Q<key>`. Xapian's terms end at 245 bytes; `term` and `key_term` put a hash in the place of
what is longer.

Errors: `PayloadInvalid`, which quotes nothing of the payload.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from outbox.errors import PayloadInvalid

LANGUAGES = (
    "ar", "ca", "da", "de", "en", "es", "eu", "fi", "fr", "ga", "hu", "hy", "id", "it",
    "lt", "nb", "ne", "nl", "nn", "no", "pt", "ro", "ru", "sv", "ta", "tr", "none",
)  # fmt: skip
"""Codes of the stemmers that every Xapian 1.4 has. `none` stems nothing."""

TERM_LIMIT = 245
"""Bytes of a term in Xapian. Whatever has fewer stands for itself, and a hash has exactly as many: the two
can't be taken for each other."""

TITLE = "S"
"""Prefix of the words of a title."""

_KEY = "Q"

# Searched as `title:word` and `key:value`; `text` is kept free for the same use.
_RESERVED = frozenset({"title", "text", "key"})
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,62}")
_MEMBERS = frozenset({"title", "text", "keywords", "data", "language"})
# Characters that can't exceed a term in UTF-8 (4 bytes at most), whatever the field.
_SURELY_SHORT = (TERM_LIMIT - 1 - 65) // 4


def document(
    *,
    title: str = "",
    text: str = "",
    keywords: Mapping[str, str | Sequence[str]] | None = None,
    data: dict[str, Any] | None = None,
    language: str = "en",
) -> dict[str, Any]:
    """The payload of an intent that puts this document into the index.

    What is empty is left out. Raises `PayloadInvalid` for what the worker couldn't index.
    """
    payload: dict[str, Any] = {}
    if title:
        payload["title"] = title
    if text:
        payload["text"] = text
    if keywords:
        if not isinstance(keywords, Mapping):
            raise PayloadInvalid("keywords is not a mapping: give {field: value} or {field: [value, …]}")
        # What isn't a sequence of text is left for `Content.of` to refuse.
        payload["keywords"] = {
            field: [values] if isinstance(values, str) else list(values) if isinstance(values, Sequence) else values
            for field, values in keywords.items()
            if values not in ("", [], ())
        }
        if not payload["keywords"]:
            del payload["keywords"]
    if data:
        payload["data"] = data
    if language != "en":
        payload["language"] = language
    Content.of(payload)
    return payload


class Content(NamedTuple):
    """A payload that was checked."""

    title: str
    text: str
    #: Field → its values, in the payload's order.
    keywords: dict[str, list[str]]
    data: dict[str, Any]
    language: str

    @classmethod
    def of(cls, payload: Any) -> Content:
        """The content of a parsed payload. Raises `PayloadInvalid` with what is wrong in it."""
        if not isinstance(payload, dict):
            raise PayloadInvalid("the payload of an index intent is not an object: build it with outbox.document")
        if not payload.keys() <= _MEMBERS:
            raise PayloadInvalid(f"the payload has an unknown member: use only {', '.join(sorted(_MEMBERS))}")
        title, text = payload.get("title", ""), payload.get("text", "")
        if not isinstance(title, str) or not isinstance(text, str):
            raise PayloadInvalid("the title or the text is not text: give a str")
        keywords = payload.get("keywords", {})
        if not isinstance(keywords, dict):
            raise PayloadInvalid("keywords is not an object: give {field: [value, …]}")
        data = payload.get("data", {})
        if not isinstance(data, dict):
            raise PayloadInvalid("data is not an object: give a dict, such as {'url': …}")
        language = payload.get("language", "en")
        if language not in LANGUAGES:
            raise PayloadInvalid(f"the language is not known: use one of {', '.join(LANGUAGES)}")
        return cls(title, text, {field: _values(field, keywords[field]) for field in keywords}, data, language)


def _values(field: Any, values: Any) -> list[str]:
    check_field(field)
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise PayloadInvalid("a keyword is not text, or empty: give each field a str or a list of them")
    return values


def check_field(field: Any) -> None:
    """Raises `PayloadInvalid` if this can't be the name of a keyword field."""
    if not isinstance(field, str) or not _FIELD.fullmatch(field):
        raise PayloadInvalid(
            "the name of a keyword field is not a name: use lower-case letters, digits and '_' (at most 63)"
        )
    if field in _RESERVED:
        raise PayloadInvalid(f"the keyword field {field!r} means something else in a query: give it another name")


def prefix(field: str) -> str:
    """What the terms of a keyword field begin with. Raises `PayloadInvalid` for what is no field."""
    check_field(field)
    return f"X{field.upper()}:"


def term(field: str, value: str) -> str:
    """The boolean term of one value of a keyword field."""
    return _term(prefix(field), value)


def key_term(key: str) -> str:
    """The unique term of the document of this key."""
    return _term(_KEY, key)


def _term(head: str, value: str) -> str:
    if len(value) <= _SURELY_SHORT and "\x00" not in value:
        return head + value
    # Written without surrogates by whoever passed the checks; one that didn't is no reason to fail here.
    encoded = value.encode("utf-8", "surrogatepass")
    # Xapian stores a NUL as two bytes.
    if len(head) + len(encoded) < TERM_LIMIT and b"\x00" not in encoded:
        return head + value
    return head + sha256(encoded).hexdigest().rjust(TERM_LIMIT - len(head), "#")
