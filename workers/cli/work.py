"""`outbox work`: drain the log into a participant."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable

from outbox.errors import NotReady
from outbox.participant import Participant
from outbox.settings import Settings, required
from workers import process

HELP = "drain the log into a participant (index, blob, mail), run the clock, or take mail's receipts"

#: In the order in which they are started.
TARGETS = ("clock", "index", "blob", "mail")

#: The server that mail's receipts are brought to. With OUTBOX_MAIL_EVIDENCE=receipt:… only.
RECEIPTS = "receipts"


def configure(parser: argparse.ArgumentParser) -> None:
    targets = [*TARGETS, RECEIPTS]
    parser.add_argument("target", metavar="TARGET", choices=[*targets, "all"], help=", ".join([*targets, "or all"]))
    parser.add_argument("--until-idle", action="store_true", help="stop when everything committed so far is done")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if args.target == "all":
        return _all(args)
    settings = Settings.load(args.state, role="worker")
    stop = process.Stop().install()
    if args.target in ("clock", RECEIPTS):
        if args.until_idle:
            raise NotReady(f"{args.target} is never idle: use --until-idle with a participant or with all")
        (process.run_clock if args.target == "clock" else _receipts)(settings, stop)
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
    from workers.evidence import evidence_for  # noqa: PLC0415
    from workers.mail import MailParticipant  # noqa: PLC0415
    from workers.relay import Relay  # noqa: PLC0415

    relay = Relay.read(settings.smtp, password_file=settings.smtp_password_file, ca_file=settings.smtp_ca_file)
    return lambda: MailParticipant(relay, evidence_for(settings.mail_evidence, settings), settings.mail_domain)


def _receipts(settings: Settings, stop: process.Stop) -> None:
    from workers import lmtp  # noqa: PLC0415
    from workers.listener import listening_socket  # noqa: PLC0415
    from workers.postmark import ReceiptAddress  # noqa: PLC0415
    from workers.relay import lmtp_target  # noqa: PLC0415

    kind, _, address = settings.mail_evidence.partition(":")
    if kind != "receipt":
        raise NotReady("there are no receipts to take: set OUTBOX_MAIL_EVIDENCE=receipt:receipt@example.org")
    receipt = ReceiptAddress.read(address)
    # Who may enter the socket's directory may connect: the mail server is another user.
    lmtp.serve(receipt, settings.database, listening_socket(lmtp_target(settings.lmtp), mode=0o666), stop)


def _all(args: argparse.Namespace) -> int:
    """One process each (an open index must not be forked, and one that dies must not take the others along)."""
    settings = Settings.load(args.state, role="worker")
    servers = ["clock", *([RECEIPTS] if settings.mail_evidence.startswith("receipt:") else [])]
    stop = process.Stop().install()
    state = ["--state", args.state] if args.state else []
    idle = ["--until-idle"] if args.until_idle else []
    command = [sys.executable, "-m", "outbox", "work"]
    # As under supervisord: they end when this process is gone, however it ended.
    supervised = {**os.environ, "SUPERVISOR_ENABLED": "1"}
    running = {
        name: subprocess.Popen(
            [*command, name, *state, *([] if name in servers else idle)], start_new_session=True, env=supervised
        )
        for name in (*servers, *TARGETS[1:])
    }
    failed = False
    try:
        while not stop.is_set():
            ended = {name: child.poll() for name, child in running.items() if child.poll() is not None}
            failed = failed or any(ended.values())
            if failed or not (running.keys() - ended.keys() - set(servers)):
                break
            threading.Event().wait(0.1)
    finally:
        for child in running.values():
            if child.poll() is None:
                child.terminate()
        for child in running.values():
            child.wait()
    return 1 if failed else 0
