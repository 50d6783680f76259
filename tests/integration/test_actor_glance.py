"""The glance: what lies between two ticks, for many lanes at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from outbox import lane, log, tick
from outbox.database import connect
from outbox.intent import Intent
from workers.actor import glance
from workers.actor.channel import Channel
from workers.actor.holding import Holding
from workers.clock import Clock
from workers.postgres import Postgres

QUEUES = ("actor.one", "actor.two")


class Lanes:
    """All lanes of two queues, and a clock, in one hand."""

    def __init__(self, conn: Any) -> None:
        self.conn = conn
        for target in QUEUES:
            conn.execute("select outbox.declare_queue(%s, 4)", (target,))
        self.clock = Clock(conn, self._claim("clock", 0))
        self.holdings = [Holding(self._claim(target, n), Channel("", target)) for target in QUEUES for n in range(4)]
        self.send("actor.one", 1)
        for holding in self.holdings:
            holding.begin(conn)
            self.read(holding)

    def _claim(self, target: str, number: int) -> lane.Lane:
        claimed = lane.claim(self.conn, target, number, owner=uuid4(), ttl=3600)
        assert claimed is not None
        return claimed

    def send(self, target: str, count: int) -> None:
        """Messages, and a tick that shows them."""
        for _ in range(count):
            self.conn.execute("select outbox.emit(%s, 'send', %s)", (target, uuid4().hex))
        self.clock.step()
        self.newest = tick.latest(self.conn)

    def read(self, holding: Holding) -> int:
        """Read on in one lane. → how many there were."""
        if page := holding.read(self.conn, self.newest, 1000):
            holding.passed(page, len(page), len(page))
        return len(page)

    def look(self, room: int) -> dict[str, int]:
        """Look, and take in what there is. → how many of each queue."""
        found = dict.fromkeys(QUEUES, 0)
        for holding, page in glance.look(self.conn, self.holdings, self.newest, dict.fromkeys(QUEUES, room)).items():
            found[holding.lane.target] += len(page)
            if page:
                holding.passed(page, len(page), len(page))
        return found

    def left(self) -> int:
        """How many are still to be read, lane by lane."""
        return sum(map(self.read, self.holdings))


@pytest.fixture(name="lanes")
def lanes_fixture(server: Postgres, database: str) -> Iterator[Lanes]:
    with connect(server.url("postgres", database), name="test") as conn:
        yield Lanes(conn)


def test_glance_i2_i3_shows_all_of_all_lanes_once_when_there_is_little(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given some messages, each queue's in four lanes
    lanes.send("actor.one", 20)
    lanes.send("actor.two", 10)
    # When nobody may read a lane by itself
    pages: list[object] = []

    def page(*what: object, **more: object) -> list[Intent]:
        pages.append((what, more))
        return []

    monkeypatch.setattr(log, "page", page)
    # Then all come by the glance, none is left, and none comes twice
    assert lanes.look(100) == {"actor.one": 20, "actor.two": 10}
    assert lanes.look(100) == {"actor.one": 0, "actor.two": 0}
    assert lanes.left() == 0
    assert pages == []


@pytest.mark.parametrize(("count", "room"), [(glance.MOST + 40, 1000), (30, 12)])
def test_glance_i2_i3_leaves_to_the_lanes_what_is_too_much(lanes: Lanes, count: int, room: int) -> None:
    # When there is more than a glance shows, or than the queue has room for
    lanes.send("actor.one", count)
    found = lanes.look(room)
    # Then no more comes than there is room for, and the rest is read lane by lane
    assert found["actor.one"] <= room
    assert found["actor.one"] + lanes.left() == count
