"""Real processes are killed at every named gap between two durable writes, and their successors at every other one.

The first sweep takes each failpoint alone; the second one each pair: a worker dies at the one, and its successor,
while it recovers, at the other. After each, everything that was promised must have come true, once.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.fixtures.failpoints import WHERE, Victims, survive
from tests.fixtures.promises import Promises
from tests.fixtures.site import Site
from tests.fixtures.zygote import Zygote

#: What takes seconds to be reached, or another process that dies, is swept alone.
ALONE = {"parked.promoted", "parked.returned", "receipt.returned", "lane.renewed"}


def named(where: str) -> list[str]:
    return [name for name, place in WHERE.items() if place == where and name not in ALONE]


INDEX = named("index")
READER = [
    name for name in INDEX if name.startswith(("reader.", "parked.", "lane.advanced")) and name != "reader.parked"
]
BLOB = [*named("blob"), *READER]
MAIL = [*named("mail"), *READER]


@pytest.mark.parametrize("name", WHERE)
def test_failpoints_i1_i2_i3_i11_everything_is_right_when_killed_at_each(
    site: Site, promises: Promises, app_url: str, name: str
) -> None:
    survive(site, promises, app_url, name)


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for where in ("app", "clock", "mailserver") for pair in product(*[named(where)] * 2)],
)
def test_failpoints_i1_i2_i3_i11_everything_is_right_when_killed_there_twice(
    site: Site, promises: Promises, app_url: str, first: str, second: str
) -> None:
    survive(site, promises, app_url, first, second)


def test_failpoints_i1_i2_i11_housekeeping_is_right_when_killed_again_and_again(
    site: Site, promises: Promises, app_url: str
) -> None:
    house = [name for name in named("house") if name != "sweep.purged"]
    survive(site, promises, app_url, "sweep.purged", *(name for first in house for name in pairs(house, first)))


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
