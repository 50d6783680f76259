"""`outbox saga`: look at sagas, and decide about them.

What is asked for is an intent: it waits its turn in the engine's lane, and `outbox saga show` says what became of it,
and who asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from outbox.cli.table import clean, table
from outbox.cli.word import count, span
from outbox.database import connect
from outbox.saga import picture, view
from outbox.saga.states import SagaState
from outbox.settings import Settings
from outbox.span import seconds

HELP = "look at sagas; cancel them, or retry, skip or resolve their steps"


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    listing = _command(commands, "list", "the newest that a filter is true for")
    listing.add_argument("--name", metavar="NAME", help="of this definition")
    listing.add_argument("--key", metavar="KEY", help="started with this key")
    listing.add_argument("--in", dest="states", choices=[s.value for s in SagaState], action="append",
                         help="in this state; again: or in this")  # fmt: skip
    listing.add_argument("--open", action="store_true", help="only those that have not ended")
    listing.add_argument("--older-than", metavar="SPAN", type=span, help="started longer ago, such as 2h or 7d")
    listing.add_argument("--limit", metavar="N", type=count, default=50, help="at most so many (default: 50)")

    show = _command(commands, "show", "one saga: its steps, and all that happened to it")
    graph = _command(commands, "graph", "the steps of a saga as a picture")
    graph.add_argument("--format", choices=["svg", "mermaid"], default="svg", help="of the picture (default: svg)")
    graph.add_argument("--output", metavar="FILE", help="where to (default: standard output)")
    cancel = _command(commands, "cancel", "let a saga go back; refused once its pivot is done")
    for each in (show, graph, cancel):
        each.add_argument("id", metavar="ID", type=_identity, help="the saga's id")
    for name, text in (
        ("retry", "try a stuck step again"),
        ("skip", "leave a stuck step out: what it holds is for you to put right"),
        ("resolve", "say whether a step has happened"),
    ):
        each = _command(commands, name, text)
        each.add_argument("id", metavar="ID", type=_identity, help="the saga's id")
        each.add_argument("step", metavar="STEP", help="the step's name")
        each.add_argument("--note", metavar="TEXT", default="", help="why, for the record")
        if name == "resolve":
            how = each.add_mutually_exclusive_group(required=True)
            how.add_argument("--done", dest="happened", action="store_true", help="it has happened (or is undone)")
            how.add_argument("--not-done", dest="happened", action="store_false", help="it has not")
    cancel.add_argument("--note", metavar="TEXT", default="", help="why, for the record")
    check = _command(commands, "check", "open sagas that the deployed code can't continue; exit 1 if there are any")
    check.add_argument("--sagas", metavar="MODULES", help="modules that define sagas (default: $OUTBOX_SAGAS)")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    made.add_argument("--state", metavar="DIR", default=argparse.SUPPRESS, help="state directory")
    if name != "graph":
        made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _identity(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a saga: see `outbox saga list`") from None


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.state, role="operator")
    with connect(settings.database, name="saga") as conn:
        if args.what == "list":
            return _list(conn, args)
        if args.what == "show":
            return _show(conn, args)
        if args.what == "graph":
            return _graph(conn, args)
        if args.what == "check":
            return _check(conn, args, settings)
        return _ask(conn, args)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, default=_json)


def _json(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _list(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    choice = view.Choice(args.name, args.key, args.states, args.open, args.older_than)
    found = view.find(conn, choice, limit=args.limit + 1)
    rows, more = found[: args.limit], len(found) > args.limit
    if args.json:
        print(_dump(rows))
    elif not rows:
        print("There are no sagas that fit.")
    else:
        head = ("saga", "name", "key", "state", "at", "for", "reason")
        print(table(head, [
            (str(r["id"]), f"{r['name']} v{r['version']}", r["key"], r["state"], ", ".join(r["steps"]) or None,
             seconds(r["seconds"]), r["reason"][:60] or None)
            for r in rows
        ]))  # fmt: skip
    if more:
        print(f"There are more than {args.limit}: narrow the filter, or use --limit.", file=sys.stderr)
    return 0


def _show(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    shown = view.show(conn, args.id)
    if args.json:
        steps = [{k: v for k, v in step.items() if k != "result"} for step in shown.steps]
        print(_dump({**shown.saga, "steps": steps, "events": shown.events}))
        return 0
    saga = shown.saga
    key = f", key {clean(saga['key'])}" if saga["key"] else ""
    print(f"saga {saga['id']}: {saga['name']} version {saga['version']}{key}")
    print(f"{saga['state']} (decision: {saga['decision']}), started {saga['started_at']:%Y-%m-%d %H:%M:%S}, "
          f"{'took' if saga['ended_at'] else 'for'} {seconds(saga['seconds'])}")  # fmt: skip
    for name in ("reason", "parent", "locks", "children"):
        if saga[name]:
            text = ", ".join(saga[name]) if isinstance(saga[name], list) else str(saga[name])
            print(f"{name}: {clean(text)}")
    print("\n" + picture.terminal(saga["nodes"], {step["step"]: step["state"] for step in shown.steps}))
    if lines := _timeline(shown):
        print("\n" + table(("at", "step", "what", "detail", "who"), lines))
    return 0


def _timeline(shown: view.Shown) -> list[tuple[Any, ...]]:
    """Steps that began and ended, and what happened in between, in order of time."""
    found: list[tuple[datetime, int, tuple[Any, ...]]] = [
        (one["at"], 1, (one["step"], one["what"], one["detail"] or None, one["who"] or None)) for one in shown.events
    ]
    for step in shown.steps:
        if not step["began_at"]:
            continue
        found.append((step["began_at"], 0, (step["step"], "begins", None, None)))
        if step["ended_at"]:
            found.append((step["ended_at"], 2, (step["step"], step["state"], step["error"] or None, None)))
        elif step["parked"]:
            why = f"intent {step['intent']}: {step['parked']}"
            found.append((step["began_at"], 3, (step["step"], "parked", why, None)))
    found.sort(key=lambda entry: entry[:2])
    return [(f"{at:%H:%M:%S.%f}"[:-3], *rest) for at, _, rest in found]


def _graph(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    shown = view.show(conn, args.id)
    states = {step["step"]: step["state"] for step in shown.steps}
    title = f"{shown.saga['name']} version {shown.saga['version']}: {shown.saga['state']}"
    nodes = shown.saga["nodes"]
    text = picture.mermaid(nodes, states) if args.format == "mermaid" else picture.svg(nodes, states, title)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)
    return 0


def _ask(conn: psycopg.Connection[Any], args: argparse.Namespace) -> int:
    step = getattr(args, "step", None)
    number = view.ask(conn, args.id, args.what, step=step, happened=getattr(args, "happened", None), note=args.note)
    if args.json:
        print(_dump({"saga": args.id, "asked": args.what, "step": step, "intent": number}))
    else:
        print(f"Asked the engine (intent {number}): see `outbox saga show {args.id}`.")
    return 0


def _check(conn: psycopg.Connection[Any], args: argparse.Namespace, settings: Settings) -> int:
    from outbox.saga.registry import deployed  # noqa: PLC0415 - imports the application

    modules = tuple(filter(None, args.sagas.split(","))) if args.sagas else settings.sagas
    lacking = view.uncontinued(conn, deployed(modules))
    if args.json:
        print(_dump(lacking))
    elif lacking:
        head = ("name", "version", "open", "oldest", "why")
        rows = [(r["name"], r["version"], r["sagas"], f"{r['oldest']:%Y-%m-%d %H:%M}", r["why"]) for r in lacking]
        print(table(head, rows))
    else:
        print("Every open saga can be continued.")
    return 1 if lacking else 0
