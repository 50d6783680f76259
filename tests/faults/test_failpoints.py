"""Real processes are killed at every named gap between two durable writes, and their successors at every other one.

The first sweep takes each failpoint alone; the second one each pair: a worker dies at the one, and its successor,
while it recovers, at the other. After each, everything that was promised must have come true, once.
"""

from __future__ import annotations

import pytest

from outbox import failpoint
from tests.fixtures.failpoints import WHERE, Victims
from tests.fixtures.promises import Promises
from tests.fixtures.zygote import Zygote

#: What takes seconds to be reached, or another process that dies, is swept alone.
ALONE = {"parked.promoted", "parked.returned", "receipt.returned", "lane.renewed"}

INDEX = [name for name, where in WHERE.items() if where == "index" and name not in ALONE]
READER = [name for name in INDEX if name.startswith(("reader.", "parked.", "lane.advanced")) and name != "reader.parked"]
BLOB = [*(name for name, where in WHERE.items() if where == "blob"), *READER]
MAIL = [*(name for name, where in WHERE.items() if where == "mail" and name not in ALONE), *READER]


def pairs(names: list[str], first: str) -> list[str]:
    """A walk over `first` and each later name, both ways: all walks together have every ordered pair."""
    walk = [first]
    for second in names[names.index(first) :]:
        walk += [second, first]
    return walk


@pytest.mark.parametrize("first", INDEX)
def test_failpoints_i2_i3_i11_index_is_right_when_its_successor_is_killed_too(
    promises: Promises, zygote: Zygote, first: str
) -> None:
    Victims(promises, zygote, "index").walk(pairs(INDEX, first))


@pytest.mark.parametrize("first", BLOB)
def test_failpoints_i2_i3_i11_blobs_are_right_when_their_successor_is_killed_too(
    promises: Promises, zygote: Zygote, first: str
) -> None:
    Victims(promises, zygote, "blob").walk(pairs(BLOB, first))


@pytest.mark.parametrize("first", MAIL)
def test_failpoints_i2_i3_i11_mail_is_right_when_its_successor_is_killed_too(
    promises: Promises, zygote: Zygote, smtp: str, first: str
) -> None:
    Victims(promises, zygote, "mail", smtp).walk(pairs(MAIL, first))
