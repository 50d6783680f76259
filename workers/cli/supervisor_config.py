"""`outbox supervisor-config`: a supervisord configuration for a production host.

Without options it prints `workers/supervisord.conf`, as shipped.
"""

from __future__ import annotations

import argparse

from workers import supervisor

HELP = "print a supervisord configuration for a production host"

_WHOLE = ("clock", "actors", "relay")
"""Programs that see to all their lanes themselves."""


def configure(parser: argparse.ArgumentParser) -> None:
    for option, default, text in (
        ("user", "outbox", "system user that the workers run as"),
        ("directory", "/var/lib/outbox", "for the stores and the logs"),
        ("command", "outbox", "how the workers are called"),
    ):
        # The name `command` alone is taken: it is the subcommand.
        parser.add_argument(
            f"--{option}",
            dest=f"with_{option}",
            metavar=option.upper(),
            default=default,
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--lanes",
        metavar="TARGET=N",
        type=_lanes,
        action="append",
        default=[],
        help="a program for each of the N lanes that `outbox register` gave it",
    )


def _lanes(text: str) -> tuple[str, int]:
    target, _, number = text.partition("=")
    if target not in supervisor.WORKERS or target in _WHOLE or not (number.isascii() and number.isdigit()):
        raise argparse.ArgumentTypeError("not of the form TARGET=N, such as index=4")
    return target, int(number)


def run(args: argparse.Namespace) -> int:
    print(supervisor.production(args.with_user, args.with_directory, args.with_command, dict(args.lanes)), end="")
    return 0
