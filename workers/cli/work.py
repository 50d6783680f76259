"""`outbox work`: drain the log into a participant.

A participant of one's own is named as `PACKAGE.MODULE:NAME`, or under its target in the entry-point group
`outbox.participants` of an installed package. What is named makes a participant when it is called without
arguments: a class, or a function. It is called once for each claim of a lane.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from outbox import status
from outbox.database import connect
from outbox.errors import NotReady
from outbox.participant import Participant
from outbox.settings import Settings, required
from workers import process

HELP = (
    "drain the log into a participant (index, blob, mail), drive sagas, run actors or relay them, the clock, receipts"
)

#: In the order in which they are started.
TARGETS = ("clock", "index", "blob", "mail", "saga")

#: The server that mail's receipts are brought to. With OUTBOX_MAIL_EVIDENCE=receipt:… only.
RECEIPTS = "receipts"

#: dramatiq's workers, which take the queues of actors.
ACTORS = "actors"

#: Queues of actors that are handed on to a broker of dramatiq. With OUTBOX_RELAY, or --to.
RELAY = "relay"
#: What sends the messages of actors' schedules, where no worker of actors runs.
CRON = "cron"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        help=", ".join([*TARGETS, RECEIPTS, ACTORS, CRON, RELAY, "all", "or your own participant's name"]),
    )
    parser.add_argument("--lane", metavar="N", type=int, help="drain this lane only, counted from 0 (default: all)")
    parser.add_argument(
        "--participant", metavar="MODULE:NAME", help="the class of your own participant, or a function that makes it"
    )
    for option, what in (("processes", "worker processes"), ("threads", "threads of each")):
        parser.add_argument(f"--{option}", metavar="N", type=int, help=f"of actors: {what} (default: dramatiq's)")
    parser.add_argument("--to", metavar="URL", help="of relay: the broker (default: OUTBOX_RELAY)")
    parser.add_argument("--queue", metavar="Q", action="append", help="of relay: a queue that is relayed from now on")
    parser.add_argument("--give-back", action="store_true", help="of relay: work the queues here again")
    parser.add_argument("--until-idle", action="store_true", help="stop when everything committed so far is done")


#: What has no lanes to choose from.
_WHOLE = {
    "clock": "clock is",
    RECEIPTS: "receipts are",
    ACTORS: "actors are",
    CRON: "schedules are",
    RELAY: "the relay is",
}


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    target = args.target
    if target != RELAY and (args.to or args.queue or args.give_back):
        raise NotReady("--to, --queue and --give-back are of relay: write outbox work relay")
    if target in ("all", *_WHOLE) and (args.lane is not None or args.participant):
        raise NotReady(f"{target} takes no --lane and no --participant: name one participant")
    if target == "all":
        return _all(args)
    if target in _WHOLE and target != RELAY and args.until_idle:
        raise NotReady(f"{_WHOLE[target]} never idle: use --until-idle with a participant or with all")
    if target in (ACTORS, CRON, RELAY):
        _of_actors(args)
        return 0
    settings = Settings.load(args.state, role="saga" if target == "saga" else "worker")
    stop = process.Stop().install()
    if target in _WHOLE:
        (process.run_clock if target == "clock" else _receipts)(settings, stop)
    else:
        if args.participant:
            make = named(args.participant)
        else:
            make = _maker(settings, target) if target in TARGETS else contributed(target)
        process.run(settings, target, make, stop, until_idle=args.until_idle, lane=args.lane)
    return 0


def _of_actors(args: argparse.Namespace) -> None:
    """Workers, schedules and the relay of actors. Each import is only paid by the process that needs it."""
    if args.target == ACTORS:
        from workers.cli.actors import become_dramatiq  # noqa: PLC0415

        become_dramatiq(args.state, processes=args.processes, threads=args.threads)
    elif args.target == CRON:
        from workers.cli.schedules import run_schedules  # noqa: PLC0415

        run_schedules(args.state, process.Stop().install())
    else:
        from workers.cli.relay import run_relay  # noqa: PLC0415

        run_relay(args, Settings.load(args.state, role="worker"), process.Stop().install())


def named(name: str) -> Callable[[], Participant]:
    """What `MODULE:NAME` names. The working directory is searched last, so that nothing in it hides a module."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise NotReady("--participant is not of the form MODULE:NAME: write it like shop.webhook:Webhook")
    sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise NotReady(f"the participant {name} can't be imported ({error}): correct --participant") from error
    except AttributeError:
        raise NotReady(f"the module {module} has no {attribute}: correct --participant") from None
    return cast("Callable[[], Participant]", found)


def contributed(target: str) -> Callable[[], Participant]:
    """The participant that an installed package has for this target."""
    for point in entry_points(group="outbox.participants", name=target):
        return cast("Callable[[], Participant]", point.load())
    raise NotReady(
        f"nothing installed is a participant {target!r}: name it with --participant, or use one of {', '.join(TARGETS)}"
    )


def _maker(settings: Settings, target: str) -> Callable[[], Participant]:
    """How to make the participant: once for each claim of a lane."""
    # Each import is only paid by the process that needs it.
    if target == "index":
        from workers.index import IndexParticipant  # noqa: PLC0415

        index = required(settings.index, "OUTBOX_INDEX")
        return lambda: IndexParticipant(index)
    if target == "blob":
        from outbox.store import open_store  # noqa: PLC0415
        from workers.blob import BlobParticipant  # noqa: PLC0415

        blobs = open_store(settings)
        return lambda: BlobParticipant(blobs)
    if target == "saga":
        from outbox.saga.registry import deployed  # noqa: PLC0415
        from workers.engine import Engine  # noqa: PLC0415

        definitions = deployed(settings.sagas)
        return lambda: Engine(settings, definitions)
    from workers.relay import Relay  # noqa: PLC0415

    relay = Relay.of(settings)
    if settings.mail_evidence.startswith("hold:"):
        from workers.heldmail import HeldMailParticipant  # noqa: PLC0415
        from workers.hold import HoldQueue  # noqa: PLC0415

        hold = HoldQueue.named(settings.mail_evidence, settings.postsuper)
        return lambda: HeldMailParticipant(relay, hold, settings.mail_domain)
    from workers.evidence import evidence_for  # noqa: PLC0415
    from workers.mail import MailParticipant  # noqa: PLC0415

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
    """Everything; with --until-idle again until nothing is left, because what a saga does next depends on what the
    others have just done."""
    settings = Settings.load(args.state, role="worker")
    servers = ["clock", *([RECEIPTS] if settings.mail_evidence.startswith("receipt:") else [])]
    servers += [ACTORS] if settings.actors else []
    drainers = [*TARGETS[1:], *([RELAY] if settings.relay else [])]
    stop = process.Stop().install()
    while True:
        failed = _round(args, servers, drainers, stop)
        if failed or stop.is_set() or not args.until_idle or not _behind(settings):
            return 1 if failed else 0


def _behind(settings: Settings) -> bool:
    """Whether anything was written that a lane has not passed."""
    with connect(settings.database, name="work") as conn:
        picture = status.read(conn)
    return picture.log["last_id"] > picture.log["high"] or any(lane["behind"] for lane in picture.lanes)


def _round(args: argparse.Namespace, servers: Sequence[str], drainers: Sequence[str], stop: threading.Event) -> bool:
    """One process each (an open index must not be forked, and one that dies must not take the others along), until they
    have all ended or one has failed. → whether one has."""
    state = ["--state", args.state] if args.state else []
    idle = ["--until-idle"] if args.until_idle else []
    command = [sys.executable, "-m", "outbox", "work"]
    # As under supervisord: they end when this process is gone, however it ended.
    supervised = {**os.environ, "SUPERVISOR_ENABLED": "1"}
    running = {
        name: subprocess.Popen(
            [*command, name, *state, *([] if name in servers else idle)], start_new_session=True, env=supervised
        )
        for name in (*servers, *drainers)
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
    return failed
