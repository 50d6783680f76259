"""`outbox why`: where an intent is, and what would move it."""

from __future__ import annotations

import argparse
import json

from outbox import whereabouts
from outbox.cli.table import clean, jsonable
from outbox.cli.word import identity
from outbox.database import connect
from outbox.settings import Settings

HELP = "say where an intent is, what it waits for, and what would move it"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", type=identity, help="the intent's id, as in outbox.log")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    with connect(Settings.load(args.state, role="operator").database, name="why") as conn:
        found = whereabouts.find(conn, args.id)
    if args.json:
        print(json.dumps(document(found, payload=False), indent=2, default=jsonable))
        return 0
    about = found.intent
    what = f" ({about['action']} {clean(about['key'])} at {about['target']})" if about else ""
    print(f"intent {found.id}{what}: {found.state}")
    print(clean(found.says))
    if found.command:
        print(f"\n  {found.command}")
    return 0


def document(found: whereabouts.Whereabouts, *, payload: bool) -> dict[str, object]:
    """What is known of an intent, without its payload unless that is asked for."""
    hidden = () if payload else ("payload",)
    intent = {name: value for name, value in (found.intent or {}).items() if name not in hidden}
    return {
        "id": found.id, "state": found.state, "says": found.says, "command": found.command, "intent": intent or None,
        "lane": found.lane, "parked": found.parked, "receipt": found.receipt, "repeated": found.repeated,
        "audit": found.audit,
    }  # fmt: skip
