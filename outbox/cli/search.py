"""`outbox search`: ask the index. Needs no database, and writes nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from outbox.search import Hit, Index, Results
from outbox.settings import Settings, required

HELP = "search the index"

_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
# Round the words found in a snippet, until it is known to be safe for the terminal.
_MARKS = ("\x02", "\x03")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "query", metavar="QUERY", nargs="+", help='words, "a phrase", AND, OR, NOT, -word, wor*, field:value'
    )
    parser.add_argument("--limit", metavar="N", type=_count, default=10, help="hits on a page (default: 10)")
    parser.add_argument("--page", metavar="N", type=_count, default=1, help="which page (default: 1)")
    parser.add_argument(
        "--filter",
        metavar="FIELD=VALUE",
        type=_filter,
        action="append",
        default=[],
        help="only documents with this keyword; again for the same field: or this one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 100_000:
        raise argparse.ArgumentTypeError("not a number from 1 to 100000")
    return number


def _filter(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not (field and equals and value):
        raise argparse.ArgumentTypeError("not of the form FIELD=VALUE")
    return field, value


def run(args: argparse.Namespace) -> int:
    filters: dict[str, list[str]] = {}
    for field, value in args.filter:
        filters.setdefault(field, []).append(value)
    query = " ".join(args.query)
    first = (args.page - 1) * args.limit
    marks = ("**", "**") if args.json else _MARKS
    with Index(_directory(args.state)) as index:
        found = index.search(query, limit=args.limit, offset=first, filters=filters, highlight=marks)
    if args.json:
        _print_json(query, args.page, found)
    else:
        _print(found, first, bold=sys.stdout.isatty())
    return 0


def _directory(state: str | None) -> Path:
    # The index can be searched while nothing is known of a database.
    named = os.environ.get("OUTBOX_INDEX")
    return Path(named) if named else required(Settings.load(state).index, "OUTBOX_INDEX")


def _print_json(query: str, page: int, found: Results) -> None:
    hits = [hit._asdict() for hit in found.hits]
    result = {"query": query, "matches": found.matches, "page": page, "hits": hits, "corrected": found.corrected}
    print(json.dumps(result, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))


def _print(found: Results, first: int, *, bold: bool) -> None:
    if found.hits:
        last = first + len(found.hits)
        print(f"{first + 1}-{last} of {'' if found.exact else 'about '}{found.matches:,}:")
        for rank, hit in enumerate(found.hits, first + 1):
            _print_hit(rank, hit, bold=bold)
        if last < found.matches:
            print("\nMore with --page.")
    elif found.matches:
        print(f"No match on this page; there are {found.matches:,} before it.")
    else:
        print("No match.")
    if found.corrected:
        print(f"Did you mean: {_clean(found.corrected)}?")


def _print_hit(rank: int, hit: Hit, *, bold: bool) -> None:
    title = _clean(hit.title) or "(no title)"
    print(f"\n{rank:>3}. {_BOLD + title + _PLAIN if bold else title}  [{_clean(hit.key)}]")
    if hit.snippet:
        print(f"     {_clean(hit.snippet, bold=bold)}{_PLAIN if bold else ''}")


def _clean(text: str, *, bold: bool = False) -> str:
    """`text` without what could steer the terminal, and its marks in bold or gone."""
    shown = {_MARKS[0]: _BOLD, _MARKS[1]: _PLAIN} if bold else dict.fromkeys(_MARKS, "")
    return "".join(shown.get(c, c if c.isprintable() else " ") for c in text)
