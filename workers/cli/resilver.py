"""`outbox resilver`: build a participant's data anew from base and log."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outbox import operation
from outbox.cli.table import table
from outbox.database import connect
from outbox.errors import NotReady
from outbox.plural import counted
from outbox.settings import Settings, required
from outbox.span import seconds
from workers.cli import course

HELP = "build the index anew beside the old one and swap them, or go through the blob store"

_COUNTS = ("whole", "missing", "damaged", "staged", "there", "copied", "deleted", "lost")
"""What is counted of blobs, in the order in which it is told."""

SHARDS = 256
"""The schema's limit on lanes."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", choices=("index", "blob"), help="index or blob")
    parser.add_argument("--shards", metavar="N", type=_shards, help="index: cut it into so many (default: as it is)")
    parser.add_argument("--from", metavar="PLACE", dest="source", help="blob: take what is missing from this store too")
    parser.add_argument("--to", metavar="PLACE", dest="to", help="blob: copy all into this store, to move there")
    course.configure(parser, of="documents, or bytes of blobs,")


def _shards(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= SHARDS:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {SHARDS}")
    return number


def run(args: argparse.Namespace) -> int:
    if args.target == "blob":
        if args.shards:
            raise NotReady("--shards is for the index: leave it out")
        return _blob(args)
    if args.source or args.to:
        raise NotReady("--from and --to are for blobs: leave them out")
    return _index(args)


def _blob(args: argparse.Namespace) -> int:
    from workers.resilver import blob  # noqa: PLC0415 - boto3, perhaps

    settings = Settings.load(args.state, role="worker")
    request = {
        "target": "blob",
        "store": str(required(settings.blobs, "OUTBOX_BLOBS")),
        "from": _absolute(args.source),
        "to": _absolute(args.to),
    }
    if request["to"]:
        blob.place(settings, request["to"])
    if request["from"]:
        blob.source(settings, request["from"])
    with connect(Settings.load(args.state, role="operator").database, name="resilver") as conn:
        planned = blob.plan(conn)
        if args.dry_run:
            shown = {**request, **planned._asdict()}
            print(json.dumps(shown, indent=2) if args.json else _blob_picture(request, planned))
            return 0
        taken = course.take_up(conn, "resilver", number=args.resume, request=request)
        if taken is not None and taken.request.get("target") != "blob":
            taken.end(conn, "running")
            raise NotReady(f"resilver {taken.id} is not of blobs: run outbox resilver index --resume {taken.id}")
        if taken is None:
            if not course.agreed(_blob_picture(request, planned), "Go through the blobs?", yes=args.yes):
                return 1
            taken = operation.begin(conn, "resilver", request)
        bar = course.Bar("reading", planned.bytes)
        with course.under_way(conn, taken), bar:
            result = blob.run(conn, settings, taken, lambda _, count: bar.advance(count), course.Pace(args.rate))
            taken.end(conn, result=result)
    print(json.dumps({"operation": taken.id, **result}, indent=2) if args.json else _blob_said(taken, result))
    return 1 if result.get("lost") else 0


def _absolute(text: str | None) -> str | None:
    return text if text is None or text.startswith("s3:") else str(Path(text).absolute())


def _blob_picture(request: dict[str, Any], planned: Any) -> str:
    from workers.resilver.index import size  # noqa: PLC0415 - Xapian

    way = (
        f"every blob that is not there whole is copied to {request['to']}"
        if request["to"]
        else "what is missing or damaged is put again, through the lanes"
    )
    rows = [
        ("store", request["store"]),
        ("blobs", f"{planned.blobs:,} live by base and log, {size(planned.bytes)}; each is read and hashed"),
        ("bytes from", request["from"] or "the store and the log"),
        ("then", way),
        ("left alone", "mail, the index, sagas: nothing is sent or emitted for them"),
    ]
    return table(("resilver", ""), rows)


def _blob_said(taken: Any, result: dict[str, Any]) -> str:
    counts = ", ".join(f"{result[name]:,} {name}" for name in _COUNTS if result.get(name)) or "no blobs"
    lines = [f"{counts} (operation {taken.id})."]
    if taken.request["to"]:
        lines.append(
            "To move there: stop what writes blobs, let the lanes drain, run this once more, set OUTBOX_BLOBS, and "
            "start everything again."
        )
    elif result.get("missing", 0) + result.get("damaged", 0) > result.get("lost", 0):
        lines.append("The blob lanes publish what was put again: see outbox status.")
    if result.get("lost"):
        lines.append("Nobody has the bytes of these; with another store, name it with --from:")
        lines += [f"  {digest}" for digest in result["digests"]]
        if result["lost"] > len(result["digests"]):
            lines.append("  … and more: outbox scrub blob lists them all")
    return "\n".join(lines)


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
    documents = "" if "documents" not in result else f"{counted(result['documents'], 'document')}, "
    return (
        f"The index is at generation {result['generation']}: {documents}{counted(result['shards'], 'shard')}, "
        f"in {seconds(result['seconds'])} (operation {number})."
    )
