"""`outbox scrub`: do participants hold what base and log say?

Exit status: 0 nothing was found, or all of it was repaired; 1 something was found, or the scrub was not done (the
reason is on stderr); 2 wrong usage; 130 stopped, and to be resumed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from outbox import operation
from outbox.cli.table import table
from outbox.cli.word import count
from outbox.database import Connection, connect
from outbox.errors import NotReady, OutboxError
from outbox.operation import Operation
from outbox.participant import Participant
from outbox.plural import counted
from outbox.settings import Settings
from outbox.store import Store
from workers.cli import course
from workers.cli.work import contributed, named
from workers.process import Stop
from workers.scrub import schedule
from workers.scrub.choice import UNSCRUBBED, subject_of
from workers.scrub.finding import KINDS
from workers.scrub.pace import Rate
from workers.scrub.repair import Repairer
from workers.scrub.subject import Subject
from workers.scrub.survey import LISTED, Progress, Survey, lanes_of
from workers.scrub.trace import check_traces

_MORE = "build the participant anew (outbox resilver), or scrub again and have more listed"

HELP = "compare what participants hold with the log, and repair it"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets", metavar="PARTICIPANT", nargs="*", help="index, blob, mail, or your own (default: those three)"
    )
    parser.add_argument("--repair", action="store_true", help="put again what is missing or wrong, delete orphans")
    parser.add_argument(
        "--participant", metavar="MODULE:NAME", help="the class of your own participant, or a function that makes it"
    )
    parser.add_argument(
        "--list", metavar="N", type=count, default=LISTED, dest="listed",
        help=f"write down so many findings of each participant, and repair those (default: {LISTED})",
    )  # fmt: skip
    parser.add_argument("--scheduled", action="store_true", help="scrub what is due by OUTBOX_SCRUB_EVERY, for ever")
    course.configure(parser, of="bytes of blobs, or else items,")


def run(args: argparse.Namespace) -> int:
    if args.scheduled:
        if args.repair or args.resume or args.participant:
            raise NotReady("--scheduled repairs and resumes nothing by hand: leave the other option out")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        schedule.run(Settings.load(args.state, role="worker"), args.targets, args.rate, Stop().install())
        return 0
    settings = Settings.load(args.state, role="operator")
    with connect(settings.database, name="scrub") as conn:
        targets = _targets(args, settings, conn)
        done = [_each(args, settings, conn, target, alone=len(targets) == 1) for target in targets]
    if args.json:
        print(json.dumps([report for report, _ in done], indent=2))
    return 1 if any(status for _, status in done) else 0


def _each(
    args: argparse.Namespace, settings: Settings, conn: Connection, target: str, *, alone: bool
) -> tuple[dict[str, Any], int]:
    """Scrub one of several: where one can't be compared, the others still can."""
    try:
        return _one(args, settings, conn, target)
    except OutboxError as error:
        if alone:
            raise
        print(f"outbox scrub: {target}: {error}", file=sys.stderr)
        return {"participant": target, "error": str(error)}, 1


def _targets(args: argparse.Namespace, settings: Settings, conn: Connection) -> list[str]:
    if args.resume is not None:
        found = [row for row in operation.find(conn, number=args.resume) if row["kind"] == schedule.KIND]
        if args.targets or not found:
            raise NotReady(
                f"--resume {args.resume} takes no participant, and must name a scrub: see outbox operations list"
            )
        args.repair = found[0]["request"].get("repair", False)
        return [found[0]["request"]["target"]]
    if args.participant and len(args.targets) != 1:
        raise NotReady("--participant is for one participant: name it before")
    return list(dict.fromkeys(args.targets)) or schedule.known(settings, conn)


def _one(args: argparse.Namespace, settings: Settings, conn: Connection, target: str) -> tuple[dict[str, Any], int]:
    """Scrub one participant. → what to report, and its part of the exit status."""
    request: dict[str, Any] = {"target": target, "repair": args.repair}
    ours = course.take_up(conn, schedule.KIND, number=args.resume, request=request)
    if ours is None:
        _check(args, settings, conn, target)  # a participant that isn't there is no operation
        ours = operation.begin(conn, schedule.KIND, request)
    with course.under_way(conn, ours):
        progress = found = _survey(args, settings, conn, ours)
        repair = args.repair and any(each.repair for each in progress.findings[progress.repaired :])
        if repair and not args.json:
            # What is agreed to has to be seen.
            _print(target, found)
        if repair and not args.dry_run and course.agreed(_plan(target, progress), "Repair?", yes=args.yes):
            progress = _repair(args, settings, conn, ours)
        elif repair and args.dry_run:
            print(_plan(target, progress), file=sys.stderr)
        ours.end(conn, "done", result=schedule.result(progress))
    if not repair and not args.json:
        _print(target, found)
    if progress.repaired and not args.json:
        print(_repaired(target, progress))
    left = progress.found - progress.mended
    return {"operation": ours.id, "participant": target, **schedule.result(progress), **_listed(progress)}, left


def _check(args: argparse.Namespace, settings: Settings, conn: Connection, target: str) -> None:
    """Raises `NotReady` for what can't be scrubbed."""
    if target == "mail":
        lanes_of(conn, target)
        check_traces(settings)
    else:
        _subject(args, settings, conn, target)[0].close()


def _subject(
    args: argparse.Namespace, settings: Settings, conn: Connection, target: str
) -> tuple[Subject, Store | None]:
    make: Callable[[], Participant] | None = None
    if args.participant:
        make = named(args.participant)
    elif target not in (*schedule.BUILT_IN, *UNSCRUBBED):
        make = contributed(target)
    return subject_of(settings, conn, target, make)


def _survey(args: argparse.Namespace, settings: Settings, conn: Connection, ours: Operation) -> Progress:
    target = ours.request["target"]
    if target == "mail":
        from workers.scrub.mail import MailSurvey  # noqa: PLC0415 - only paid where it is used

        return MailSurvey(settings, conn, ours, listed=args.listed).run()
    subject, store = _subject(args, settings, conn, target)
    rate = None if args.rate is None else Rate(args.rate, "items" if store is None else "bytes")
    with course.Bar(f"scrub {target}", None) as bar:
        survey = Survey(
            conn, ours, subject, rate=rate, listed=args.listed, tell=_shown(bar, by_bytes=store is not None)
        )
        try:
            return survey.run()
        finally:
            subject.close()


def _repair(args: argparse.Namespace, settings: Settings, conn: Connection, ours: Operation) -> Progress:
    subject, store = _subject(args, settings, conn, ours.request["target"])
    with course.Bar("repair", len(Progress.read(ours.progress).findings)) as bar:
        try:
            return Repairer(conn, ours, subject, store, tell=lambda progress: bar.at(progress.repaired)).run()
        finally:
            subject.close()


def _shown(bar: course.Bar, *, by_bytes: bool) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if by_bytes:
            bar.at(progress.bytes, progress.total_bytes)
        else:
            bar.at(progress.items, progress.total)

    return tell


def _print(target: str, progress: Progress) -> None:
    counts = [progress.counts.get(kind, 0) for kind in KINDS]
    head = ("participant", "items", "bytes", *KINDS, "in motion", "tick")
    print(table(head, [(target, progress.items, progress.bytes, *counts, progress.moving, progress.tick)]))
    if progress.note:
        print(f"! {progress.note}")
    if progress.findings:
        rows = [(each.kind, each.key, each.id or None, each.why, each.advice or None) for each in progress.findings]
        print(table(("kind", "key", "intent", "what is wrong", "what to do"), rows))
    if progress.found > len(progress.findings):
        print(f"… and {progress.found - len(progress.findings):,} more: {_MORE} (--list {progress.found})")


def _plan(target: str, progress: Progress) -> str:
    puts = sum(1 for each in progress.findings if each.repair == "put")
    deletes = sum(1 for each in progress.findings if each.repair == "delete")
    left = progress.found - puts - deletes
    rows = [("put again", puts), ("deleted", deletes), ("left for a person", left)]
    unlisted = progress.found > len(progress.findings)
    text = f"Repair of {target}, through its lanes:\n" + table(("what", "findings"), rows)
    return text + (f"\nOnly those that are listed are repaired; for the others, {_MORE}." if unlisted else "")


def _repaired(target: str, progress: Progress) -> str:
    what = counted(progress.emitted, "intent", then=(" was", " were"))
    text = f"{what} written to repair {target}, for its lanes to apply (outbox status)."
    rows = [(each.key, each.why, each.advice) for each in progress.findings if not each.repair]
    return f"{text}\n{table(('not repaired', 'what is wrong', 'what to do'), rows)}" if rows else text


def _listed(progress: Progress) -> dict[str, Any]:
    return {"findings": [finding._asdict() for finding in progress.findings]}
