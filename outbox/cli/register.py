"""`outbox register`: make a participant known, with its lanes."""

from __future__ import annotations

import argparse

import psycopg

from outbox import sql
from outbox.database import connect
from outbox.errors import NotReady
from outbox.intent import NAME
from outbox.settings import Settings

HELP = "make a participant known, or give it more lanes before it is used"

LANES = 256
"""The schema's limit. More lanes than processors gain nothing; the number can't change later."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="index, blob, mail, or the name of your own participant")
    parser.add_argument(
        "--lanes", metavar="N", type=_lanes, help="slices of its keys, drained side by side (default for a new one: 1)"
    )


def _lanes(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= LANES:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {LANES}")
    return number


def run(args: argparse.Namespace) -> int:
    if not NAME.fullmatch(args.target):
        raise NotReady("the target is not a name: use lower-case letters, digits, '_', '.', '-' (at most 63)")
    with connect(Settings.load(args.state, role="admin").database, name="register") as conn:
        try:
            row = conn.execute(sql.load("register"), {"target": args.target, "lanes": args.lanes}).fetchone()
        except psycopg.DatabaseError as error:
            if error.sqlstate != "OB010":
                raise
            raise NotReady(f"{error.diag.message_primary}. {error.diag.message_hint}") from None
        count = conn.execute("select lanes from outbox.participant where target = %s", (args.target,)).fetchone()
    assert row is not None  # noqa: S101 - a function without FROM has one row
    assert count is not None  # noqa: S101 - it is registered now
    lanes = f"{count[0]} lane{'s' if count[0] > 1 else ''}"
    if not row[0]:
        print(f"{args.target} was registered, with {lanes}.")
    else:
        print(f"{args.target} is registered, with {lanes}. Start its workers (again): they ask for the lanes once.")
    return 0
