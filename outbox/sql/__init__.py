"""SQL statements in files of their own, one a file, each with a header: purpose, locks, tables."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import LiteralString


@cache
def load(name: str) -> LiteralString:
    """The statement in `outbox/sql/<name>.sql`. It is a file of this package, so it counts as literal."""
    text: LiteralString = files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
    return text
