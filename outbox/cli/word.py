"""Words of the command line that are numbers and spans of time; for argparse's `type`."""

from __future__ import annotations

import argparse

from outbox.span import parse


def identity(text: str) -> int:
    """The number of an intent, a tick, an operation."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an id: ids are whole numbers from 1 on")
    return number


def count(text: str) -> int:
    """How many."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: use 1 or more")
    return number


def span(text: str) -> float:
    """A span of time in seconds."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
