"""`outbox saga`: look at sagas, and decide about them.

What is asked for is an intent: it waits its turn in the engine's lane, and `outbox saga show` says what became of it,
and who asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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

CHUNK = 100
"""Requests between two looks at the progress."""

HELP = "look at sagas; cancel them, or retry, skip or resolve their steps"


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    listing = _command(commands, "list", "the newest that a filter is true for")
    _filters(listing, 50)
    listing.add_argument("--in", dest="states", choices=[s.value for s in SagaState], action="append",
                         help="in this state; again: or in this")  # fmt: skip
    listing.add_argument("--open", action="store_true", help="only those that have not ended")

    show = _command(commands, "show", "one saga: its steps, and all that happened to it")
    show.add_argument("--results", action="store_true", help="its input and its steps' results too")
    graph = _command(commands, "graph", "the steps of a saga as a picture")
    graph.add_argument("--format", choices=["svg", "mermaid"], default="svg", help="of the picture (default: svg)")
    graph.add_argument("--output", metavar="FILE", help="where to (default: standard output)")
    for each in (show, graph):
        each.add_argument("id", metavar="ID", type=_identity, help="the saga's id")
    for name, text in (
        ("cancel", "let sagas go back; refused once their pivot is done"),
        ("retry", "try stuck steps again"),
        ("skip", "leave stuck steps out: what they hold is for you to put right"),
    ):
        each = _command(commands, name, text)
        each.add_argument("id", metavar="ID", type=_identity, nargs="?", help="of this saga")
        if name != "cancel":
            each.add_argument("step", metavar="STEP", nargs="?", help="this step only")
            each.add_argument("--step", metavar="STEP", dest="every", help="steps of this name")
        _filters(each, None)
        each.add_argument("--note", metavar="TEXT", default="", help="why, for the record")
        each.add_argument("--yes", action="store_true", help="don't ask")
        each.set_defaults(usage_error=each.error)
    resolve = _command(commands, "resolve", "say whether a step has happened")
    resolve.add_argument("id", metavar="ID", type=_identity, help="the saga's id")
    resolve.add_argument("step", metavar="STEP", help="the step's name")
    resolve.add_argument("--note", metavar="TEXT", default="", help="why, for the record")
    how = resolve.add_mutually_exclusive_group(required=True)
    how.add_argument("--done", dest="happened", action="store_true", help="it has happened (or is undone)")
    how.add_argument("--not-done", dest="happened", action="store_false", help="it has not")
    check = _command(commands, "check", "open sagas that the deployed code can't continue; exit 1 if there are any")
    check.add_argument("--sagas", metavar="MODULES", help="modules that define sagas (default: $OUTBOX_SAGAS)")


def _filters(parser: argparse.ArgumentParser, limit: int | None) -> None:
    parser.add_argument("--name", metavar="NAME", help="of this definition")
    parser.add_argument("--key", metavar="KEY", help="started with this key")
    parser.add_argument("--older-than", metavar="SPAN", type=span, help="started longer ago, such as 2h or 7d")
    text = "at most so many" if limit is None else f"at most so many (default: {limit})"
    parser.add_argument("--limit", metavar="N", type=count, default=limit, help=text)


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
        # The application's own data only where they are asked for.
        left = () if args.results else ("input", "result")
        saga, *steps = ({k: v for k, v in row.items() if k not in left} for row in (shown.saga, *shown.steps))
        print(_dump({**saga, "steps": steps, "events": shown.events}))
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
    if args.results:
        print("\ninput: " + clean(json.dumps(saga["input"], ensure_ascii=False)))
    if lines := _timeline(shown, results=args.results):
        print("\n" + table(("at", "step", "what", "detail", "who"), lines))
    return 0


_EARLY = frozenset({"signal", "refusal"})
"""What may happen to a step before it begins."""


def _timeline(shown: view.Shown, *, results: bool) -> list[tuple[Any, ...]]:
    """Steps that began and ended, and what happened in between, in order of time."""
    #: By time. What has one time is of one transaction: steps first, in their order, then what happened, in its order.
    found: list[tuple[tuple[datetime, int, int, int], tuple[Any, ...]]] = [
        ((one["at"], 1, n, 0), (one["step"], one["what"], one["detail"] or None, one["who"] or None))
        for n, one in enumerate(shown.events)
    ]
    for n, step in enumerate(shown.steps):
        if not step["began_at"]:
            continue
        name, about = step["step"], [one for one in shown.events if one["step"] == step["step"]]
        # Its row is written a moment later than what happened to it in the same transaction.
        began = min([step["began_at"], *(one["at"] for one in about if one["what"] not in _EARLY)])
        found.append(((began, 0, n, 0), (name, "begins", None, None)))
        if step["state"] == "failed" and any(one["what"] == "failed" for one in about):
            continue  # that is said already, with why
        if step["ended_at"]:
            undone = [one["at"] for one in about if one["what"] == "undoing"]
            result = json.dumps(step["result"], ensure_ascii=False) if results and step["result"] is not None else None
            line = (name, "done" if undone else step["state"], result or step["error"] or None, None)
            found.append(((min([step["ended_at"], *undone]), 0, n, 1), line))
        elif step["parked"]:
            why = f"intent {step['intent']}: {step['parked']}"
            found.append(((step["began_at"], 2, n, 0), (name, "parked", why, None)))
    found.sort(key=lambda entry: entry[0])
    return [(f"{key[0]:%H:%M:%S.%f}"[:-3], *rest) for key, rest in found]


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
    """Ask the engine, for one saga or for those that a filter is true for: then after showing which, and a yes."""
    wanted = _wanted(conn, args)
    if wanted is None:
        return 1
    happened, made = getattr(args, "happened", None), []
    shows = len(wanted) > CHUNK and sys.stderr.isatty()
    for saga, step in wanted:
        number = view.ask(conn, saga, args.what, step=step, happened=happened, note=args.note)
        made.append({"saga": saga, "asked": args.what, "step": step, "intent": number})
        if shows and not len(made) % CHUNK:
            print(f"\r{len(made):,} of {len(wanted):,}", end="", file=sys.stderr, flush=True)
    if shows:
        print(file=sys.stderr)
    if args.json:
        print(_dump(made))
    elif args.id:
        numbers = ", ".join(str(one["intent"]) for one in made)
        print(f"Asked the engine (intent {numbers}): see `outbox saga show {args.id}`.")
    else:
        print(f"Asked the engine to {args.what} {_many(made, args)}: see `outbox saga list --open`.")
    return 0


def _many(found: Sequence[Any], args: argparse.Namespace) -> str:
    noun = "saga" if args.what == "cancel" else "step"
    return f"{len(found):,} {noun}{'' if len(found) == 1 else 's'}"


def _wanted(conn: psycopg.Connection[Any], args: argparse.Namespace) -> list[tuple[UUID, str | None]] | None:
    """What is asked about: sagas, and steps of them; None: nothing is, and why was said."""
    if args.id and (args.what in ("cancel", "resolve") or args.step):
        return [(args.id, getattr(args, "step", None))]
    named = (args.id, args.name, args.key, args.older_than, getattr(args, "every", None))
    if all(value is None for value in named):
        args.usage_error("name what it is about: give an ID, or a filter such as --name or --older-than")
    choice = view.Choice(args.name, args.key, open=True, older=args.older_than)
    found: list[tuple[UUID, str | None]]
    if args.what == "cancel":
        found = [(row["id"], None) for row in view.find(conn, choice, limit=args.limit)]
    else:
        found = [*view.stuck(conn, choice, saga=args.id, step=args.every, limit=args.limit)]
    if not found:
        print("Nothing fits: see `outbox saga list --open`.", file=sys.stderr)
        return None
    if not args.id and not args.yes and not _agreed(found, args):
        return None
    return found


def _agreed(found: Sequence[Any], args: argparse.Namespace) -> bool:
    print(f"{args.what} {_many(found, args)}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.isatty() and sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("\nNothing was done: add --yes to do it.", file=sys.stderr)
    return False


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
