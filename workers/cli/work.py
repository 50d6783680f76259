"""`outbox work`: drain the log into a participant."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable

from outbox import status
from outbox.database import connect
from outbox.errors import NotReady
from outbox.participant import Participant
from outbox.settings import Settings, required
from workers import process

HELP = "drain the log into a participant (index, blob, mail), drive the sagas, or run the clock"

#: In the order in which they are started.
TARGETS = ("clock", "index", "blob", "mail", "saga")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", choices=[*TARGETS, "all"], help=", ".join([*TARGETS, "or all"]))
    parser.add_argument("--until-idle", action="store_true", help="stop when everything committed so far is done")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if args.target == "all":
        return _all(args)
    settings = Settings.load(args.state, role="saga" if args.target == "saga" else "worker")
    stop = process.Stop().install()
    if args.target == "clock":
        if args.until_idle:
            raise NotReady("the clock is never idle: use --until-idle with a participant or with all")
        process.run_clock(settings, stop)
    else:
        process.run(settings, args.target, _maker(settings, args.target), stop, until_idle=args.until_idle)
    return 0


def _maker(settings: Settings, target: str) -> Callable[[], Participant]:
    """How to make the participant: once for each claim of a lane."""
    # Each import is only paid by the process that needs it.
    if target == "index":
        from workers.index import IndexParticipant  # noqa: PLC0415

        index = required(settings.index, "OUTBOX_INDEX")
        return lambda: IndexParticipant(index)
    if target == "blob":
        from outbox.blob import BlobStore  # noqa: PLC0415
        from workers.blob import BlobParticipant  # noqa: PLC0415

        blobs = BlobStore(required(settings.blobs, "OUTBOX_BLOBS"))
        return lambda: BlobParticipant(blobs)
    if target == "saga":
        from outbox.saga.registry import deployed  # noqa: PLC0415
        from workers.engine import Engine  # noqa: PLC0415

        definitions = deployed(settings.sagas)
        return lambda: Engine(settings, definitions)
    from workers.evidence import evidence_for  # noqa: PLC0415
    from workers.mail import MailParticipant  # noqa: PLC0415

    return lambda: MailParticipant(settings.smtp, evidence_for(settings.mail_evidence), settings.mail_domain)


def _all(args: argparse.Namespace) -> int:
    """Everything; with --until-idle again until nothing is left, because what a saga does next depends on what the
    others have just done."""
    settings = Settings.load(args.state, role="worker")
    stop = process.Stop().install()
    while True:
        failed = _round(args, stop)
        if failed or stop.is_set() or not args.until_idle or not _behind(settings):
            return 1 if failed else 0


def _behind(settings: Settings) -> bool:
    """Whether anything was written that a lane has not passed."""
    with connect(settings.database, name="work") as conn:
        picture = status.read(conn)
    return picture.log["last_id"] > picture.log["high"] or any(lane["behind"] for lane in picture.lanes)


def _round(args: argparse.Namespace, stop: threading.Event) -> bool:
    """One process each (an open index must not be forked, and one that dies must not take the others along), until they
    have all ended or one has failed. → whether one has."""
    state = ["--state", args.state] if args.state else []
    idle = ["--until-idle"] if args.until_idle else []
    command = [sys.executable, "-m", "outbox", "work"]
    # As under supervisord: they end when this process is gone, however it ended.
    supervised = {**os.environ, "SUPERVISOR_ENABLED": "1"}
    running = {
        name: subprocess.Popen(
            [*command, name, *state, *([] if name == "clock" else idle)], start_new_session=True, env=supervised
        )
        for name in TARGETS
    }
    failed = False
    try:
        while not stop.is_set():
            ended = {name: child.poll() for name, child in running.items() if child.poll() is not None}
            failed = failed or any(ended.values())
            if failed or not (running.keys() - ended.keys() - {"clock"}):
                break
            threading.Event().wait(0.1)
    finally:
        for child in running.values():
            if child.poll() is None:
                child.terminate()
        for child in running.values():
            child.wait()
    return failed
