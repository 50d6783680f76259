"""`outbox operations`: replays, scrubs, resilvers and whatever else takes long: who asked, how far, what came of it."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

import psycopg

from outbox import operation
from outbox.cli.table import jsonable, table
from outbox.cli.word import count, identity
from outbox.database import connect
from outbox.errors import NotReady
from outbox.lane import is_gone, owner_of
from outbox.settings import Settings

HELP = "list operations (replays, scrubs, resilvers, …), show one, or give one up"


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    listing = _command(commands, "list", "the newest, the last one last")
    listing.add_argument("--kind", metavar="KIND", help="such as replay or scrub")
    listing.add_argument("--in", dest="within", choices=get_args(operation.State), help="in this state only")
    listing.add_argument("--limit", metavar="N", type=count, default=50, help="at most so many (default: 50)")
    show = _command(commands, "show", "everything that is known of one")
    abandon = _command(commands, "abandon", "give one up that has not ended: it can't be resumed then")
    abandon.add_argument("--note", metavar="TEXT", default="", help="why, for the record")
    for each in (show, abandon):
        each.add_argument("id", metavar="ID", type=identity, help="its number")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.add_argument("--state", metavar="DIR", default=argparse.SUPPRESS, help="state directory")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(args: argparse.Namespace) -> int:
    with connect(Settings.load(args.state, role="operator").database, name="operations") as conn:
        if args.what == "list":
            rows = operation.find(conn, kind=args.kind, state=args.within, limit=args.limit)
            print(json.dumps(rows, indent=2, default=jsonable) if args.json else _table(rows))
            return 0
        if args.what == "abandon":
            operation.resume(conn, args.id).end(conn, "abandoned", error=args.note[:1000])
        row = _find(conn, args.id)
    print(json.dumps(row, indent=2, default=jsonable) if args.json else _picture(row))
    return 0


def _find(conn: psycopg.Connection[Any], number: int) -> dict[str, Any]:
    found = operation.find(conn, number=number)
    if not found:
        raise NotReady(f"there is no operation {number}: see outbox operations list")
    return found[0]


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "There is no such operation."
    head = ("id", "kind", "state", "started", "ended", "who", "client", "asked for")
    return table(
        head,
        [
            (row["id"], row["kind"], _state(row), *map(_when, (row["started_at"], row["ended_at"])), row["who"],
             row["client"], json.dumps(row["request"], ensure_ascii=False))
            for row in rows
        ],
    )  # fmt: skip


def _picture(row: dict[str, Any]) -> str:
    shown = {name: value for name, value in row.items() if name not in ("runs", "place") and value not in (None, "")}
    shown["state"] = _state(row)
    if row["runs"]:
        shown["owner"] = owner_of(row["place"])
    return table(
        ("operation", ""),
        [(n, json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else str(v)) for n, v in shown.items()],
    )


def _state(row: dict[str, Any]) -> str:
    # A process that was killed has its lease for a while yet; on this machine one can see that it is gone.
    left = row["state"] == "running" and (not row["runs"] or is_gone(row["place"]))
    return "to be resumed" if left else str(row["state"])


def _when(at: Any) -> str | None:
    return None if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
