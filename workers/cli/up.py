"""`outbox up`: start the embedded stack and say where everything is."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from workers.stack import Info, Stack

HELP = "start Postgres, a mail server and the workers in a state directory"


def configure(_parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def stack(args: argparse.Namespace) -> Stack:
    """The stack that the command line or the environment names."""
    return Stack(args.state or os.environ.get("OUTBOX_STATE") or ".outbox")


def progress() -> Callable[[str], None]:
    """Prints the steps with their times to a person; a log file gets only the result."""
    begin = time.monotonic()

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(f"{time.monotonic() - begin:5.1f} s  {line}", file=sys.stderr, flush=True)

    return say


def run(args: argparse.Namespace) -> int:
    if os.environ.get("OUTBOX_DATABASE"):
        print("outbox up: OUTBOX_DATABASE is not used here: the embedded stack has its own Postgres", file=sys.stderr)
    here = stack(args)
    started = here.up(progress())
    print(f"outbox is {'up' if started else 'already up'} in {here.state}")
    print(_where(here.info()), end="")
    return 0


def _where(info: Info) -> str:
    # The default directory of the commands is found without being named.
    default = Path(".outbox").resolve() == info.state and not os.environ.get("OUTBOX_STATE")
    named = "" if default or os.environ.get("OUTBOX_STATE") else f" --state {shlex.quote(str(info.state))}"
    return f"""
  database  {info.database}
  mail      {info.mail} (nothing leaves this machine)
  blobs     {info.blobs}
  index     {info.index}
  logs      {info.logs}

  outbox status{named}            what is applied, what waits, what is parked
  outbox search{named} WORDS      ask the index
  outbox down{named}              stop everything; the data stays

An application in this directory finds all of it by itself; elsewhere:
  export OUTBOX_STATE={shlex.quote(str(info.state))}
"""
