"""Generations of the index: which folder of it is in use.

    <index>/00, 01, …          generation 0, that of an index that was never resilvered: one folder for each shard
    <index>/g7/00, 01, …       generation 7
    <index>/g7/READY           searches may read it

The database says which generation the lanes write (`outbox.participant`). Searches read the newest one that is ready:
a resilver says so when the new generation has caught up with the old one, and if it dies before that, the next owner
of a lane does. As the newest one counts, whoever says it late about an older one changes nothing. Applications look
for each query, so that they are on the new generation with the next one.

What `ready` has written is durable when it returns.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

READY = "READY"
"""Name of the empty file in the folder of a generation that searches may read."""

_FOLDER = re.compile(r"g([1-9]\d{0,17})")


def folder(directory: Path, number: int) -> Path:
    """Where the shards of a generation are."""
    return directory / f"g{number}" if number else directory


def folders(directory: Path) -> list[int]:
    """Generations whose folders are there, ready or not, in order. Generation 0 has none of its own."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_FOLDER.fullmatch, names) if match)


def current(directory: Path) -> int:
    """The generation that searches read."""
    found = (number for number in reversed(folders(directory)) if is_ready(directory, number))
    return next(found, 0)


def is_ready(directory: Path, number: int) -> bool:
    """Whether searches may read a generation."""
    return not number or (folder(directory, number) / READY).exists()


def ready(directory: Path, number: int) -> None:
    """Let searches read a generation. Its shards must be durable."""
    if not number:
        return
    place = folder(directory, number)
    os.close(os.open(place / READY, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    sync(place)


def sync(place: Path) -> None:
    """Make the names in a folder durable."""
    opened = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
