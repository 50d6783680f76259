"""Arrays as Postgres writes them: one text for a column of many rows.

Used where statements take thousands of rows at a time: the driver's own arrays look at each element for its type and
for what has to be quoted, which took a third of the saga engine's time.
"""

from __future__ import annotations

from collections.abc import Iterable


def array(values: Iterable[object]) -> str:
    """`values` as the literal of a one-dimensional array; the statement casts it (`%(id)s::uuid[]`). None is null.

    Each value is written as `str` has it: texts, numbers, booleans, UUIDs, JSON as text.
    """
    # Between quotes only these two characters mean something.
    quoted = ["null" if v is None else '"' + str(v).replace("\\", "\\\\").replace('"', '\\"') + '"' for v in values]
    return "{" + ",".join(quoted) + "}"


def plain(values: Iterable[object]) -> str:
    """The same for numbers, booleans, UUIDs and names of states, which have nothing to be quoted. None is null."""
    return "{" + ",".join(["null" if v is None else str(v) for v in values]) + "}"
