"""`outbox audit`: what operators did."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from outbox import audit
from outbox.cli.table import jsonable, table
from outbox.cli.word import count, identity, span
from outbox.database import connect
from outbox.decision import Action
from outbox.settings import Settings

HELP = "show what operators did with parked intents (what takes long is in outbox operations)"


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="the newest actions, the last one last")
    listing.add_argument("--state", metavar="DIR", default=argparse.SUPPRESS, help="state directory")
    listing.add_argument("--intent", metavar="ID", type=identity, help="of this intent only")
    listing.add_argument("--target", metavar="NAME", help="of this participant's intents only")
    listing.add_argument("--action", choices=get_args(Action), help="of this kind only")
    listing.add_argument("--who", metavar="USER", help="by this database user only")
    listing.add_argument("--since", metavar="SPAN", type=span, help="not older than this, such as 2h or 7d")
    listing.add_argument("--limit", metavar="N", type=count, default=50, help="at most so many (default: 50)")
    listing.add_argument("--json", action="store_true", help="print one JSON array")


def run(args: argparse.Namespace) -> int:
    with connect(Settings.load(args.state, role="operator").database, name="audit") as conn:
        rows = audit.find(
            conn, intent=args.intent, target=args.target, action=args.action, who=args.who, since=args.since,
            limit=args.limit,
        )  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2, default=jsonable))
    elif rows:
        print(trail(rows))
    else:
        print("No operator has done that.")
    return 0


def trail(rows: list[dict[str, object]]) -> str:
    """Audit rows as a table."""
    head = ("at", "who", "client", "action", "intent", "participant", "was", "note")
    names = ("who", "client", "action", "intent", "target", "reason", "note")
    return table(head, [(f"{row['at']:%Y-%m-%d %H:%M:%S}", *(row[name] for name in names)) for row in rows])
