"""`outbox resilver`: build a participant's data anew from base and log."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outbox.cli.table import table
from outbox.database import connect
from outbox.errors import NotReady
from outbox.settings import Settings, required
from outbox.span import seconds
from workers.cli import course

HELP = "build the index anew beside the old one and swap them, or go through the blob store"

SHARDS = 256
"""The schema's limit on lanes."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", choices=("index",), help="index")
    parser.add_argument("--shards", metavar="N", type=_shards, help="cut the index into so many (default: as it is)")
    course.configure(parser, of="documents")


def _shards(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= SHARDS:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {SHARDS}")
    return number


def run(args: argparse.Namespace) -> int:
    return _index(args)


def _index(args: argparse.Namespace) -> int:
    from workers.resilver import index  # noqa: PLC0415 - Xapian

    settings = Settings.load(args.state, role="worker")
    directory = Path(required(settings.index, "OUTBOX_INDEX")).absolute()
    with connect(Settings.load(args.state, role="operator").database, name="resilver") as conn:
        planned = index.plan(conn, directory, args.shards)
        if args.dry_run:
            print(json.dumps(asdict(planned), indent=2) if args.json else _picture(planned))
            return 0
        taken = course.take_up(conn, "resilver", number=args.resume, request=planned.asked)
        if taken is not None and taken.request.get("target") != "index":
            taken.end(conn, "running")
            raise NotReady(f"resilver {taken.id} is not of the index: run outbox resilver blob --resume {taken.id}")
        if taken is None:
            obstacle = planned.obstacle()
            if obstacle:
                raise NotReady(obstacle)
            if not course.agreed(_picture(planned), "Build the new index?", yes=args.yes):
                return 1
            taken = index.begin(conn, planned)
        bar = _Bar(planned.documents)
        with course.under_way(conn, taken), bar:
            result = index.run(conn, settings, taken, bar.tell, course.Pace(args.rate))
            taken.end(conn, result=result)
    print(json.dumps({"operation": taken.id, **result}, indent=2) if args.json else _said(taken.id, result))
    return 0


class _Bar(course.Bar):
    """Documents are built once and checked once."""

    def __init__(self, documents: int) -> None:
        super().__init__("building", 2 * documents)

    def tell(self, what: str, count: int) -> None:
        """Of `what`, `count` more documents are done."""
        self.say(what)
        self.advance(count)


def _picture(planned: Any) -> str:
    from workers.resilver.index import size  # noqa: PLC0415 - Xapian

    rows = [
        ("index", planned.directory),
        ("documents", f"{planned.documents:,} live by base and log"),
        ("shards", f"{planned.shards_now} now, {planned.shards} then"),
        ("generation", f"{planned.generation_now} now, {planned.generation} then"),
        ("room", f"about {size(planned.bytes_now)} more until the old one is removed, {size(planned.bytes_free)} free"),
        ("takes", f"about {seconds(planned.seconds)}; the old index serves, and is written, meanwhile"),
        ("left alone", "mail, blobs, sagas: nothing is sent or emitted"),
    ]
    return table(("resilver", ""), rows)


def _said(number: int, result: dict[str, Any]) -> str:
    documents = "" if "documents" not in result else f"{result['documents']:,} documents, "
    return (
        f"The index is at generation {result['generation']}: {documents}{result['shards']} shards, "
        f"in {seconds(result['seconds'])} (operation {number})."
    )
