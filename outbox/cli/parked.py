"""`outbox parked`: look at parked intents, and decide about them.

A decision names its intents by id, or by a filter. By filter it first prints the plan and asks; `--yes` answers. It is
made in transactions of some hundred intents: what was decided before Ctrl-C stays decided, and is in the audit trail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import psycopg

from outbox import decision, whereabouts
from outbox.cli.audit import trail
from outbox.cli.table import clean, jsonable, table
from outbox.cli.why import document
from outbox.cli.word import count, identity, span
from outbox.database import connect
from outbox.decision import ACTS_ON, CHUNK, LISTED, Action, Choice, Decided
from outbox.parked import Reason
from outbox.plural import counted
from outbox.settings import Settings
from outbox.span import seconds

HELP = "look at parked intents, and retry, skip or resolve them"

_DONE: dict[Action, str] = {
    "retry": "to be tried now",
    "skip": "skipped",
    "applied": "resolved as applied",
    "not_applied": "resolved as not applied, to be tried now",
}


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    listing = _command(commands, "list", "those that a filter is true for")
    _filters(listing)
    listing.add_argument("--limit", metavar="N", type=count, default=50, help="at most so many (default: 50)")

    show = _command(commands, "show", "everything that is known of intents, parked or not")
    show.add_argument("ids", metavar="ID", type=identity, nargs="+", help="ids of intents")
    show.add_argument("--payload", action="store_true", help="the payload too")

    retry = _command(commands, "retry", "try them now, as if they had never failed")
    skip = _command(commands, "skip", "never try them again; the next one of each key has its turn")
    resolve = _command(commands, "resolve", "say what became of those in doubt")
    outcome = resolve.add_mutually_exclusive_group(required=True)
    outcome.add_argument(
        "--sent", "--applied", dest="action", action="store_const", const="applied", help="the effect happened"
    )
    outcome.add_argument(
        "--not-sent", "--not-applied", dest="action", action="store_const", const="not_applied",
        help="it didn't: try again",
    )  # fmt: skip
    for each in (retry, skip, resolve):
        _filters(each)
        each.add_argument("--limit", metavar="N", type=count, help="at most so many, the first of the log")
        each.add_argument("--note", metavar="TEXT", default="", help="why, for the audit trail")
        each.add_argument("--yes", action="store_true", help="don't ask")
        each.set_defaults(usage_error=each.error)
    retry.set_defaults(action="retry")
    skip.set_defaults(action="skip")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.add_argument("--state", metavar="DIR", default=argparse.SUPPRESS, help="state directory")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", type=identity, nargs="*", help="ids of intents")
    parser.add_argument("--target", metavar="NAME", help="of this participant")
    parser.add_argument("--reason", choices=get_args(Reason), action="append", help="parked for this; again: or this")
    parser.add_argument("--key", metavar="KEY", help="of this key")
    parser.add_argument("--key-prefix", metavar="TEXT", help="of keys that begin so")
    parser.add_argument("--older-than", metavar="SPAN", type=span, help="parked for longer, such as 2h or 7d")
    parser.add_argument("--error", metavar="TEXT", help="whose error contains this")


def _choice(args: argparse.Namespace, reasons: Sequence[str]) -> Choice:
    return Choice(
        ids=args.ids or None, target=args.target, key=args.key, key_prefix=args.key_prefix,
        reasons=args.reason or (None if args.ids else reasons), older_than=args.older_than, error=args.error,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with connect(Settings.load(args.state, role="operator").database, name="parked") as conn:
        if args.what == "list":
            return _list(conn, args)
        if args.what == "show":
            return _show(conn, args)
        return _decide(conn, args)


def _list(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    found = decision.find(conn, _choice(args, LISTED), limit=args.limit + 1)
    rows, more = found[: args.limit], len(found) > args.limit
    if args.json:
        print(json.dumps(rows, indent=2, default=jsonable))
    elif not rows:
        print("Nothing is parked that fits.")
    else:
        print(_table(rows))
    if more:
        print(f"There are more than {args.limit}: narrow the filter, or use --limit.", file=sys.stderr)
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("intent", "participant", "key", "reason", "tries", "next try", "parked", "error")
    return table(
        head,
        [
            (row["id"], row["target"], row["key"], row["reason"], row["attempts"],
             "now" if row["trying"] else seconds(row["retry_seconds"] and max(0.0, row["retry_seconds"])),
             seconds(row["parked_seconds"]), row["error"])
            for row in rows
        ],
    )  # fmt: skip


def _show(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    found = [whereabouts.find(conn, number) for number in args.ids]
    if args.json:
        print(json.dumps([document(each, payload=args.payload) for each in found], indent=2, default=jsonable))
        return 0
    print("\n\n".join(_picture(each, payload=args.payload) for each in found))
    return 0


def _picture(found: whereabouts.Whereabouts, *, payload: bool) -> str:
    parts = [f"intent {found.id}: {found.state}\n{clean(found.says)}"]
    if found.command:
        parts[0] += f"\n\n  {found.command}"
    for name in ("intent", "lane", "parked", "receipt"):
        values = getattr(found, name)
        if values:
            shown = [(n, _value(v)) for n, v in values.items() if n not in ("id", "payload") and v is not None]
            parts.append(table((name, ""), shown))
    if payload and found.intent:
        parts.append(clean(found.intent["payload"]))
    if found.audit:
        parts.append(trail(found.audit))
    return "\n\n".join(parts)


def _value(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _decide(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    action: Action = args.action
    choice = _choice(args, ACTS_ON[action])
    named = (args.target, args.reason, args.key, args.key_prefix, args.older_than, args.error)
    if not args.ids and all(value is None for value in named):
        args.usage_error("name the intents: give ids, or a filter such as --target or --key")
    if len(args.note) > decision.NOTE_LIMIT:
        args.usage_error(f"the note has {len(args.note)} characters, the limit is {decision.NOTE_LIMIT}")
    by_filter = not args.ids or any(value is not None for value in named)
    ids: Sequence[int] = args.ids
    if by_filter:
        planned = decision.find(conn, choice, limit=args.limit)
        ids = [row["id"] for row in planned]
        if not ids:
            print("Nothing is parked that fits.", file=sys.stderr)
            return 1
        if not args.yes and not _agreed(action, planned):
            return 1
    return _report(args, action, _carry_out(conn, action, ids, args.note))


def _agreed(action: Action, planned: Sequence[dict[str, Any]]) -> bool:
    """Print the plan, and ask."""
    counts = Counter((row["target"], row["reason"]) for row in planned)
    print(
        table(("participant", "reason", "intents"), [(*what, n) for what, n in sorted(counts.items())]), file=sys.stderr
    )
    if not sys.stdin.isatty():
        print("Nothing was done: add --yes to do it.", file=sys.stderr)
        return False
    print(f"{counted(len(planned), 'intent')} {_DONE[action]}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("Nothing was done.", file=sys.stderr)
    return False


def _carry_out(conn: psycopg.Connection[Any], action: Action, ids: Sequence[int], note: str) -> list[Decided]:
    # From the last to the first: nothing that is to be skipped has its turn between two transactions.
    todo = sorted(set(ids), reverse=True)
    decided: list[Decided] = []
    shows = len(todo) > CHUNK and sys.stderr.isatty()
    for start in range(0, len(todo), CHUNK):
        decided += decision.decide(conn, action, todo[start : start + CHUNK], note=note)
        if shows:
            bar = "#" * (len(decided) * 30 // len(todo))
            print(f"\r[{bar:<30}] {len(decided):,} of {len(todo):,}", end="", file=sys.stderr, flush=True)
    if shows:
        print(file=sys.stderr)
    return sorted(decided)


def _report(args: argparse.Namespace, action: Action, decided: Sequence[Decided]) -> int:
    refused = [one for one in decided if one.refused is not None]
    if args.json:
        print(json.dumps([one._asdict() for one in decided], indent=2))
    else:
        done = len(decided) - len(refused)
        print(f"{counted(done, 'intent')} {_DONE[action]}.")
        for one in refused:
            print(f"intent {one.id}: not done: {one.refused}", file=sys.stderr)
    return 1 if refused else 0
