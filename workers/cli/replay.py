"""`outbox replay`, also `replay-outbox`: say again what the log has said, so that a participant gets it back.

It is an operation (`outbox operations`), and follows the course of one (`workers.cli.course`). What is repeated, what
is left out and why is for `outbox.replay`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import psycopg

from outbox.cli import main as command
from outbox.cli.table import table
from outbox.cli.word import identity
from outbox.database import connect
from outbox.errors import NotReady
from outbox.operation import Operation
from outbox.plural import counted
from outbox.replay import plan
from outbox.replay.choice import Choice, Parked
from outbox.replay.course import KIND, Course, Step, begin
from outbox.settings import Settings
from outbox.span import parse, seconds
from outbox.store import Store, open_store
from workers.cli import course

HELP = "say again what the log has said, so that a participant gets it back"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", metavar="PARTICIPANT", nargs="*", help="of these only (default: all)")
    parser.add_argument("--key", metavar="KEY", help="of this key")
    parser.add_argument("--key-prefix", metavar="TEXT", help="of keys that begin so")
    parser.add_argument("--model", metavar="NAME", help="about this mapped class, or of keys NAME/…")
    parser.add_argument(
        "--from",
        dest="begin",
        metavar="TIME",
        type=moment,
        help="written then (UTC without a zone) or later; or so long ago, as 2h",
    )
    parser.add_argument("--to", dest="end", metavar="TIME", type=moment, help="written before; as --from")
    parser.add_argument("--after-tick", metavar="N", type=identity, help="that this tick does not show yet")
    parser.add_argument("--upto-tick", metavar="N", type=identity, help="that this tick shows")
    parser.add_argument("--saga", metavar="ID", type=UUID, help="written by this saga")
    parser.add_argument(
        "--parked", choices=get_args(Parked), action="append", default=[],
        help="set aside for this, instead of applied; again: or this",
    )  # fmt: skip
    parser.add_argument("--from-archive", metavar="PLACE", help="archived in this directory, or in s3://BUCKET/PREFIX")
    parser.add_argument("--resend-mail", action="store_true", help="mail too, under new Message-IDs")
    parser.add_argument(
        "--events", action="store_true", help="of your own participants: what is neither put nor delete"
    )
    parser.add_argument("--wait", action="store_true", help="until the participants have applied it")
    course.configure(parser)
    parser.set_defaults(usage_error=parser.error)


def moment(text: str) -> datetime | timedelta:
    """`2026-11-30`, `2026-11-30T14:05`, with a zone or in UTC; or a span ago, such as `2h`."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            ago = parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a time: write it like 2026-11-30T14:05+01:00, or like 2h for two hours ago"
            ) from None
        return timedelta(seconds=ago)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def main() -> int:
    """The command `replay-outbox`."""
    return command(["replay", *sys.argv[1:]])


def run(args: argparse.Namespace) -> int:
    choice = _choice(args)
    settings = Settings.load(args.state, role="operator")
    with (
        connect(settings.database, name="replay") as conn,
        connect(settings.database, name="replay") as stream,
    ):
        if stream.pooled:
            raise NotReady("a replay reads with a cursor, which a pooler may lose: connect past the pooler")
        store = _store(settings)
        found = None
        if not args.dry_run:
            found = course.take_up(conn, KIND, number=args.resume, request=choice.request())
        if found is not None and args.resume is None and not course.agreed("", "Go on with it?", yes=args.yes):
            found.end(conn, "running")
            return 1
        planned: plan.Plan | None = None
        if found is None:
            chosen = choice.resolve(conn)
            endpoint = settings.s3_endpoint
            planned = plan.make(conn, choice, chosen, rate=args.rate, store=store, endpoint=endpoint)
            if args.dry_run or not planned.intents:
                return _only_planned(args, planned, store)
            question = f"Repeat {counted(planned.intents, 'intent')}?"
            if not course.agreed(_picture(planned, store), question, yes=args.yes):
                return 1
            found = begin(conn, choice, chosen, planned.intents)
        replay = Course(conn, stream, found, store=store, rate=args.rate, endpoint=settings.s3_endpoint)
        return _carry_out(args, conn, replay, found, planned)


def _choice(args: argparse.Namespace) -> Choice:
    if "" in (args.key, args.key_prefix, args.model):
        args.usage_error("no key is empty: leave the option out to choose all of them")
    if sum(value is not None for value in (args.key, args.key_prefix, args.model)) > 1:
        args.usage_error("give one of --key, --key-prefix and --model")
    given = (args.after_tick, args.upto_tick, args.parked or None)
    if args.from_archive is not None and any(value is not None for value in given):
        args.usage_error("an archive knows nothing of ticks and of what is parked: choose otherwise")
    choice = Choice(
        targets=tuple(sorted(set(args.targets))), key=args.key, key_prefix=args.key_prefix, model=args.model,
        saga=args.saga,
        begin=args.begin, end=args.end, after_tick=args.after_tick, upto_tick=args.upto_tick,
        parked=tuple(sorted(set(args.parked))), archive=args.from_archive, resend_mail=args.resend_mail,
        events=args.events,
    )  # fmt: skip
    if args.resume is not None and (choice != Choice() or args.dry_run):
        args.usage_error("--resume goes on with what was chosen when it began: leave the other options out")
    return choice


def _store(settings: Settings) -> Store | None:
    """Where blobs are looked for, if this host knows."""
    return None if settings.blobs is None else open_store(settings)


def _only_planned(args: argparse.Namespace, planned: plan.Plan, store: Store | None) -> int:
    if args.json:
        print(json.dumps({"plan": planned.document()}, indent=2))
    else:
        print(_picture(planned, store))
    return 0


def _picture(planned: plan.Plan, store: Store | None) -> str:
    if not planned.lines:
        return "Nothing in the log fits."
    rows = [(line.target, line.action, line.intents, line.effect) for line in planned.lines]
    text = table(("participant", "action", "intents", "effect"), rows)
    if any(line.target == "blob" for line in planned.lines) and store is None:
        text += "\n\nWhether the bytes of blobs are there is not known: OUTBOX_BLOBS is not set here."
    if not planned.intents:
        return f"{text}\n\nNothing is to be repeated."
    speeds = [f"{name} {'not measured' if r is None else f'{r:,.0f}/s'}" for name, r in planned.rates.items()]
    took = "for an unknown time" if planned.seconds is None else f"for about {seconds(planned.seconds)}"
    what = counted(planned.intents, "intent", then=(" is", " are"))
    return f"{text}\n\n{what} repeated, {took} ({', '.join(speeds)})."


def _carry_out(
    args: argparse.Namespace,
    conn: psycopg.Connection[Any],
    replay: Course,
    found: Operation,
    planned: plan.Plan | None,
) -> int:
    total, done = found.progress["planned"], found.progress["again"]
    with course.under_way(conn, found), course.Bar(f"{KIND} {found.id}", total, done) as bar:
        _follow(replay.steps(), bar, course.Pace(args.rate))
        if args.wait:
            _follow(replay.applied(), bar, course.Pace(None))
        result = replay.end()
    parked = _parked(conn, found.id) if args.wait else None
    if args.json:
        shown = {"operation": found.id, **result, "parked": parked}
        print(json.dumps(shown if planned is None else {"plan": planned.document(), **shown}, indent=2))
        return 0
    print(f"{counted(result['again'], 'intent')} repeated (operation {found.id}).")
    for why, count in sorted(result["left_out"].items()):
        print(f"{count:,} {plan.LEFT_OUT.get(why, _LATE.get(why, why))}.", file=sys.stderr)
    if parked:
        print(f"{parked:,} of them {'is' if parked == 1 else 'are'} parked: outbox parked list.", file=sys.stderr)
    return 0


_LATE = {
    "refused": "left out: their recipients had refused them, or they could not be skipped",
    "unreadable": "left out: the payload is not a mail's",
}


def _follow(steps: Iterator[Step], bar: course.Bar, pace: course.Pace) -> None:
    for step in steps:
        bar.say(f"waiting for {step.target}" if step.waits else step.target)
        bar.advance(step.again)
        pace.keep(step.again)


def _parked(conn: psycopg.Connection[Any], number: int) -> int:
    """How many of a replay's intents are parked now."""
    row = conn.execute(
        "select count(*) from outbox.word where parked is not null and headers @> %s::jsonb",
        (json.dumps({"replay": {"operation": number}}),),
    ).fetchone()
    return 0 if row is None else int(row[0])
