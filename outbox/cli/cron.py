"""`outbox cron`: the schedules of actors: when each comes next, and what it sent last; send one now; forget one."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import psycopg
from psycopg.rows import dict_row

from outbox import sql
from outbox.cli.table import jsonable, table
from outbox.database import connect
from outbox.decision import client
from outbox.errors import NotReady
from outbox.settings import Settings
from outbox.span import seconds

HELP = "list the schedules of actors, send a message of one now, or forget one that is gone"

LATE = 60.0
"""Seconds after its time from which a slot is overdue."""


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    _command(commands, "list", "each with its next time, by its own time zone, and its last message")
    now = _command(commands, "run", "send the message of a schedule now; its times stay as they are")
    forget = _command(commands, "forget", "remove a schedule that no worker declares any more")
    for each in (now, forget):
        each.add_argument("name", metavar="NAME", help="its name")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.add_argument("--state", metavar="DIR", default=argparse.SUPPRESS, help="state directory")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(args: argparse.Namespace) -> int:
    with connect(Settings.load(args.state, role="operator").database, name="cron") as conn:
        if args.what == "run":
            return _run(conn, args.name, json_wanted=args.json)
        if args.what == "forget":
            return _forget(conn, args.name, json_wanted=args.json)
        with conn.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(sql.load("cron_list")).fetchall()
    print(json.dumps(rows, indent=2, default=jsonable) if args.json else _table(rows))
    return 0


def _run(conn: psycopg.Connection[Any], name: str, *, json_wanted: bool) -> int:
    try:
        with conn.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(sql.load("cron_run"), {"name": name, "client": client()}).fetchone()
    except psycopg.DatabaseError as error:
        if error.sqlstate != "OB020":
            raise
        raise NotReady(f"{error.diag.message_primary}. {error.diag.message_hint}") from None
    assert row is not None  # noqa: S101 - a function without FROM has one row
    if json_wanted:
        print(json.dumps(row))
    elif row["sent"]:
        print(f"{name}: sent as intent {row['id']}: see outbox why {row['id']}")
    else:
        print(f"{name}: not sent, because intent {row['id']} has its unique key and is pending")
    return 0


def _forget(conn: psycopg.Connection[Any], name: str, *, json_wanted: bool) -> int:
    if conn.execute(sql.load("cron_forget"), {"name": name}).fetchone() is None:
        raise NotReady(f"there is no schedule {name} that no worker has declared for a minute: see outbox cron list")
    print(json.dumps({"name": name}) if json_wanted else f"{name} is forgotten.")
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "There is no schedule: workers declare those of their actors when they begin."
    head = ("name", "expression", "time zone", "missed", "declared", "next", "last", "intent", "message")
    return table(
        head,
        [
            (row["name"], row["expression"], row["timezone"], row["missed"], _declared(row), _next(row),
             _local(row["last_slot"] or row["last_at"], row["timezone"]), row["last_id"], row["last_message"])
            for row in rows
        ],
    )  # fmt: skip


def _declared(row: dict[str, Any]) -> str:
    return "yes" if row["declared"] else f"no: not since {row['seen_at']:%Y-%m-%d %H:%M:%S %Z}"


def _next(row: dict[str, Any]) -> str | None:
    if not row["declared"]:
        return None
    late = row["overdue"] or 0.0
    at = _local(row["next_at"], row["timezone"])
    return f"{at} (overdue for {seconds(late)}: see the log of the workers)" if late > LATE else at


def _local(at: datetime | None, zone: str) -> str | None:
    if at is None:
        return None
    # Where this machine doesn't know the zone, the time is right all the same.
    with suppress(ZoneInfoNotFoundError):
        at = at.astimezone(ZoneInfo(zone))
    return f"{at:%Y-%m-%d %H:%M:%S %Z}"
