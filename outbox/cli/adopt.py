"""`outbox adopt`: go on with a log that was restored, taken over or copied.

It prints what this looks like and what was not done, and asks; `--yes` answers. It is one transaction: killed at any
moment it is done or it isn't, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from outbox import adoption
from outbox.adoption import Adopted, Plan
from outbox.cli.table import jsonable, table
from outbox.database import connect
from outbox.plural import counted
from outbox.settings import Settings
from outbox.watermark import Watermark

HELP = "go on with a log that was restored from a backup, taken over by a standby, or copied"

_NEXT = """\
Next:
  outbox up, or outbox work all           the workers go on where the log was
  outbox status                           a lane that is ahead of the log is stopped, and says what to do
  outbox parked list --reason in_doubt    what may have happened in the lost time, and nobody can know"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what it looks like and what was not done")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--json", action="store_true", help="print JSON; needs --yes or --dry-run")


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.state, role="operator")
    with connect(settings.database, name="adopt") as conn:
        plan = adoption.plan(conn, Watermark(settings.state))
        if not args.json:
            print(_text(plan))
        if args.dry_run or not (args.yes or (not args.json and _agreed())):
            if args.json:
                print(_dump(plan, None))
            return 0 if args.dry_run else 1
        adopted = adoption.adopt(conn, plan, lambda text: print(text, file=sys.stderr))
    if args.json:
        print(_dump(plan, adopted))
        return 0
    print(
        f"Era {adopted.era} has begun. To be done still, of before: {counted(adopted.not_done, 'intent')}; "
        f"in doubt: {adopted.in_doubt:,}."
    )
    print(_NEXT)
    return 0


def _text(plan: Plan) -> str:
    rows = [(p.target, p.not_done, p.parked, p.in_doubt) for p in plan.participants]
    return (
        f"Era {plan.era.number} can't go on: {plan.trouble.says}.\n\n"
        + table(("participant", "not done", "of it parked", "in doubt then"), rows)
        + "\n\nNothing of it is skipped. What is in doubt may have been done in the time that the database has lost: "
        "its worker looks for it first,\nand parks what nothing can tell. Intents of that time are gone: compare "
        "the participants with the log afterwards."
    )


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("Nothing was done: add --yes to do it.", file=sys.stderr)
        return False
    print("Go on with this log here? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("Nothing was done.", file=sys.stderr)
    return False


def _dump(plan: Plan, adopted: Adopted | None) -> str:
    shown: dict[str, Any] = {
        "era": plan.era.number,
        "looks_like": plan.trouble.kind,
        "says": plan.trouble.says,
        "participants": [one._asdict() for one in plan.participants],
        "adopted": adopted._asdict() if adopted else None,
    }
    return json.dumps(shown, indent=2, default=jsonable)
