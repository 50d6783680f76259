"""The command `outbox`.

A command is a module with three names: `HELP` (one line), `configure(parser)` and `run(args) -> int` (the exit
status). Those of this package are listed here; others come from the entry-point group `outbox.commands`,
by name, so that the ones that need Xapian or supervisord are only imported when they are asked for.

Exit status: 0 done, 1 not done (the reason is on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

import psycopg

from outbox import __version__
from outbox.database import reason
from outbox.errors import OutboxError

#: Commands of this package → their modules, in the order of the help.
COMMANDS = {
    "migrate": "outbox.cli.migrate",
    "register": "outbox.cli.register",
    "status": "outbox.cli.status",
    "why": "outbox.cli.why",
    "parked": "outbox.cli.parked",
    "audit": "outbox.cli.audit",
    "operations": "outbox.cli.operations",
    "adopt": "outbox.cli.adopt",
    "search": "outbox.cli.search",
    "saga": "outbox.cli.saga",
    "cron": "outbox.cli.cron",
}


def _modules() -> dict[str, str]:
    contributed = {point.name: point.value for point in entry_points(group="outbox.commands")}
    return COMMANDS | dict(sorted(contributed.items()))


def _load(name: str, module: str) -> ModuleType | None:
    try:
        return import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] in ("outbox", "workers"):
            raise
        need = f"needs the package {error.name}: pip install 'postgres-outbox[embedded]'"
        print(f"outbox {name}: {need}", file=sys.stderr)
        return None


def _parser(wanted: str | None) -> tuple[argparse.ArgumentParser, dict[str, ModuleType | None]]:
    parser = argparse.ArgumentParser(
        prog="outbox", description="Postgres as the transaction coordinator of search, files and mail."
    )
    parser.add_argument("--version", action="version", version=f"outbox {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    loaded: dict[str, ModuleType | None] = {}
    modules = _modules()
    for name, module in modules.items():
        # One command loads one module; only the help needs them all.
        if wanted in modules and name != wanted:
            continue
        found = loaded[name] = _load(name, module)
        if found is None:
            continue
        sub = commands.add_parser(name, help=found.HELP, description=found.HELP)
        sub.add_argument("--state", metavar="DIR", help="state directory (default: $OUTBOX_STATE or .outbox)")
        found.configure(sub)
    return parser, loaded


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status; errors are one clear sentence on stderr, never a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    parser, loaded = _parser(next((word for word in arguments if not word.startswith("-")), None))
    if len(loaded) == 1 and None in loaded.values():
        return 1
    args = parser.parse_args(arguments)
    module = loaded[args.command]
    if module is None:
        return 1
    try:
        status = int(module.run(args))
        sys.stdout.flush()  # here, where it is known what a closed pipe means
        return status  # noqa: TRY300 - what is printed is part of it
    except psycopg.errors.InsufficientPrivilege as error:
        role = getattr(module, "ROLE", "outbox_operator")
        advice = f"name a user in OUTBOX_DATABASE that is a member of {role} (GRANT {role} TO …)"
        print(f"outbox {args.command}: {reason(error)}: {advice}", file=sys.stderr)
    except (OutboxError, psycopg.OperationalError) as error:
        print(f"outbox {args.command}: {reason(error)}", file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"outbox {args.command}: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
    return 1
