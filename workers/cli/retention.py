"""`outbox retention`: archive the old part of the log, carry what is live in it into the base, and drop it.

Prints a plan first and asks. Killed or interrupted anywhere, it is taken up where it was by running it again; the clock
does the same by itself where OUTBOX_RETENTION is set.

Exit status: 0 done (also when there is nothing to do), 1 not done, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import psycopg

from outbox import horizon, retention
from outbox.cli.table import jsonable, table
from outbox.cli.word import span
from outbox.database import connect
from outbox.errors import NotReady
from outbox.plural import counted
from outbox.retention import Partition, Plan
from outbox.settings import NO_ARCHIVE, Settings, archive_place, is_bucket
from outbox.span import seconds
from workers.cli import course

HELP = "archive and drop the old part of the log, or say why it has to stay"

RATE = 11_000
"""Intents a second, about, of all steps for one partition: what `make bench ARGS=retention` measured on two cores that
were busy with other things too."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--age", metavar="SPAN", type=span, help="what is older goes (default: $OUTBOX_RETENTION)")
    parser.add_argument(
        "--archive", metavar="PLACE", help="directory, s3://BUCKET/PREFIX, or none (default: $OUTBOX_ARCHIVE)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and do nothing")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.state, role="operator")
    age = settings.retention if args.age is None else args.age
    if age is None:
        raise NotReady("OUTBOX_RETENTION is not set: say with --age how old the log gets, such as --age 30d")
    place = archive_place(args.archive) or retention.place_of(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with connect(settings.database, name="retention") as conn:
        plan = retention.plan(conn, age)
        report: dict[str, Any] = {"age": age, "archive": str(place), **_document(plan), "dropped": []}
        if args.json and args.dry_run:
            return _print(conn, report)
        text = _text(plan, age, place)
        if args.dry_run or not plan.ready:
            print(text, file=sys.stderr if args.json else sys.stdout)
        else:
            question = f"Archive and drop {counted(len(plan.ready), 'partition')}?"
            if not course.agreed(text, question, yes=args.yes):
                return 1
            report["dropped"] = _drop(conn, plan, place, age, settings)
        if not args.dry_run:
            report["forgotten"] = retention.forget(conn, age)
        if args.json:
            return _print(conn, report)
        for gone in report["dropped"]:
            where = f"archived as {gone['archive']}" if gone["archive"] else "not archived"
            print(f"{gone['partition']}: {counted(gone['intents'], 'intent')} dropped, {where}")
    return 0


def _drop(
    conn: psycopg.Connection[Any], plan: Plan, place: Path | str, age: float, settings: Settings
) -> list[dict[str, Any]]:
    gone = []
    for each in plan.ready:
        with course.Bar(f"archiving {each.name}", each.intents or None) as bar:
            written = retention.drop(conn, each, place, age=age, endpoint=settings.s3_endpoint, progress=bar.advance)
        gone.append(
            {
                "partition": each.name, "first": each.first, "until": each.until, "intents": written.intents,
                "archive": written.name, "sha256": written.sha256, "bytes": written.bytes,
            }
        )  # fmt: skip
    return gone


def _print(conn: psycopg.Connection[Any], report: dict[str, Any]) -> int:
    now = horizon.read(conn)
    print(json.dumps({"horizon": {"id": now.id, "tick": now.tick}, **report}, indent=2, default=jsonable))
    return 0


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "ready": [each._asdict() for each in plan.ready],
        "kept": None if plan.kept is None else plan.kept._asdict(),
        "holds": [{**hold._asdict(), "says": str(hold)} for hold in plan.holds],
    }


def _text(plan: Plan, age: float, place: Path | str) -> str:
    parts = []
    if plan.ready:
        head = ("partition", "first id", "last id", "intents", "MB", "committed")
        parts.append(table(head, [_row(each) for each in plan.ready]))
        to = "without an archive" if place == NO_ARCHIVE else f"to {'the bucket' if is_bucket(place) else place}"
        took = seconds(sum(each.intents for each in plan.ready) / RATE)
        parts.append(f"They go {to}; what is live in them is kept in outbox.base. It takes about {took}.")
    if plan.kept is None:
        parts.append("Every other partition is still being filled.")
    elif not plan.holds:
        assert plan.kept.seconds is not None  # noqa: S101 - else something holds it
        parts.append(
            f"{plan.kept.name} stays: it is {seconds(plan.kept.seconds)} old, and goes when it is {seconds(age)} old."
        )
    else:
        parts += [f"{plan.kept.name} stays: {hold}." for hold in plan.holds]
    return "\n".join(parts)


def _row(each: Partition) -> tuple[Any, ...]:
    return (
        each.name, each.first, each.until - 1, each.intents, each.bytes // 1_000_000, f"{seconds(each.seconds)} ago"
    )  # fmt: skip
