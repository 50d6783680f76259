"""`outbox doctor`: does this host offer what the settings promise?"""

from __future__ import annotations

import argparse
import json

from outbox.settings import Settings
from workers import doctor

HELP = "check this host for what the settings need: database, stores, mail server"


def configure(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(doctor.NAMES)
    parser.add_argument("subject", metavar="SUBJECT", nargs="*", type=_subject, help=f"{known} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _subject(name: str) -> str:
    if name not in doctor.NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(doctor.NAMES)}")
    return name


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.state, role="worker")
    checks = []
    for check in doctor.examine(settings, args.subject or doctor.NAMES):
        checks.append(check)
        if not args.json:
            # Each at once: some take a second.
            advice = "" if check.ok else f"\n     {check.advice}"
            print(f"{'ok' if check.ok else '!!'}   {check.subject:9} {check.name}: {check.found}{advice}", flush=True)
    healthy = all(check.ok for check in checks)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [check._asdict() for check in checks]}, indent=2))
    return 0 if healthy else 1
