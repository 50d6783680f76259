"""`outbox status`: where the log, the clock and each lane stand."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from outbox.cli.table import table
from outbox.database import connect
from outbox.lane import owner_of
from outbox.settings import Settings
from outbox.span import seconds
from outbox.status import COUNT_LIMIT, Status, read

HELP = "show the log, the clock, each lane, what is parked and what holds rows back"

WATCH_EVERY = 1.0
"""Seconds between pictures with --watch."""


def configure(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object")
    how.add_argument("--watch", action="store_true", help="show it anew every second, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.state, role="worker")
    with connect(settings.database, name="status") as conn:
        while True:
            status = read(conn, retention_age=settings.retention)
            if args.json:
                print(json.dumps({**asdict(status), "warnings": status.warnings()}, indent=2))
                return 0
            text = render(status)
            if not args.watch:
                print(text)
                return 0
            # Home, the picture, clear the rest: no flicker.
            print("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J" if sys.stdout.isatty() else text, flush=True)
            time.sleep(WATCH_EVERY)


def render(status: Status) -> str:
    """The picture as text for a terminal."""
    log = status.log
    clock = f"runs (epoch {log['clock_epoch']})" if log["clock_runs"] else "does not run"
    age = seconds(log["tick_seconds"])
    begins = f", from {log['first_id']:,} on kept" if log["first_id"] > 1 else ""
    parts = [
        f"log {log['log']}: {log['last_id']:,} ids drawn{begins}; tick {log['tick']:,}, {age} old; clock {clock}",
        table(
            ("lane", "owner", "epoch", "behind", "lag", "state", "position"),
            [
                (
                    f"{lane['target']}/{lane['lane']}",
                    owner_of(lane["place"]) if lane["owned"] else None,
                    lane["epoch"],
                    f"{COUNT_LIMIT:,}+" if lane["behind"] >= COUNT_LIMIT else f"{lane['behind']:,}",
                    seconds(lane["lag_seconds"] or 0.0),
                    lane["state"],
                    lane["position"],
                )
                for lane in status.lanes
            ],
        ),
    ]
    if status.parked:
        rows = [(p["target"], p["reason"], p["count"], seconds(p["oldest_seconds"])) for p in status.parked]
        parts.append("parked\n" + table(("participant", "reason", "intents", "oldest"), rows))
    if status.sagas:
        states = [(s["state"], s["count"], seconds(s["oldest_seconds"])) for s in status.sagas]
        parts.append("open sagas\n" + table(("state", "sagas", "oldest"), states))
    if status.followers:
        rows = [(f["name"], f["tick"], f"{seconds(f['seen_seconds'])} ago", f["note"]) for f in status.followers]
        parts.append("followers (the log is kept for them)\n" + table(("name", "tick", "seen", "what"), rows))
    if status.scrubs:
        done = [
            (s["target"], s["found"], s["found"] - s["mended"], f"{seconds(s['seconds'])} ago", seconds(s["every"]))
            for s in status.scrubs
        ]
        parts.append("last scrubs\n" + table(("participant", "found", "left", "begun", "every"), done))
    if status.holders:
        rows = [
            (h["prepared"] or f"pid {h['pid']}", seconds(h["seconds"]), h["state"], h["application_name"])
            for h in status.holders
        ]
        parts.append(
            "open transactions that wrote to the log (their own intents wait for them)\n"
            + table(("transaction", "open for", "state", "application"), rows)
        )
    parts += [f"! {warning}" for warning in status.warnings()]
    return "\n\n".join(parts)
