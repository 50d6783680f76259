"""`outbox down`: stop the embedded stack. The data stays."""

from __future__ import annotations

import argparse

from workers.cli.up import progress, stack

HELP = "stop the embedded stack; the data stays"


def configure(_parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def run(args: argparse.Namespace) -> int:
    here = stack(args)
    stopped = here.down(progress())
    print(f"outbox is down in {here.state}" if stopped else f"outbox was not running in {here.state}")
    return 0
