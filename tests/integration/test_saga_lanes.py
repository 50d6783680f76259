"""Two lanes of the engine: parents and children, and holders of one lock, are often another engine's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from outbox import Saga, cli
from outbox import lane as lanes
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from tests.fixtures.sagas import Rig, sink_step
from workers.engine import Engine
from workers.postgres import Postgres
from workers.reader import Reader

LANES = 2
POISON = Outcome(Verdict.POISON, error="it can't be done")


class Lanes(Rig):
    """A rig with an engine for each lane."""

    def __init__(self, server: Postgres, database: str) -> None:
        super().__init__(server, database)
        self.engines: dict[int, Reader] = {}

    def __getitem__(self, number: int) -> Reader:
        if number not in self.engines:
            conn = psycopg.connect(self.settings.database, autocommit=True)
            lane = lanes.claim(conn, "saga", number, owner=uuid.uuid4(), ttl=600)
            assert lane is not None
            engine = Engine(self.settings, self.definitions)
            self.engines[number] = Reader(conn, lane, engine, backoff=Backoff(first=0.0, limit=0.0))
            self.engines[number].open()
        return self.engines[number]

    def kill(self, number: int) -> None:
        reader = self.engines.pop(number)
        reader.participant.close()
        reader.conn.close()
        self.admin.execute(
            "update outbox.lane set lease_until = now() - interval '1 s' where target = 'saga' and lane = %s", (number,)
        )

    def settle(self, *, sink: bool = True) -> None:
        for _ in range(10_000):
            moved = self.clock.step()
            for reader in [*(self[n] for n in range(LANES)), *([self.sinker] if sink else [])]:
                reader.decided()
                moved = reader.step() or moved
            if not moved:
                return
        raise AssertionError("the sagas never come to rest")

    def lane_of(self, saga: UUID) -> int:
        """Whose it is."""
        row = self.admin.execute(
            "select lane from outbox.lane where target = 'saga' and outbox.slot(%s) between slot_low and slot_high",
            (str(saga),),
        ).fetchone()
        assert row is not None
        return int(row[0])

    def close(self) -> None:
        for number in list(self.engines):
            self.kill(number)
        super().close()


@pytest.fixture
def rig(server: Postgres, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lanes]:
    """`saga` is registered with one lane by the migration; an administrator gives it two before it is used."""
    monkeypatch.setenv("OUTBOX_DATABASE", server.url(database=database))
    assert cli.main(["register", "saga", "--lanes", str(LANES)]) == 0
    made = Lanes(server, database)
    try:
        yield made
    finally:
        made.close()


def locking(name: str) -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga(name, dict, locks=lambda value: [value["lock"]])
    function_steps(saga, "f")
    saga.signal("go", timeout=3600.0)
    return saga


def function_steps(saga: Saga[Any], name: str) -> None:
    saga.function(name=name)(lambda _session, _run: None).undo(lambda _session, _run: None)


@pytest.mark.parametrize("good", [True, False])
def test_saga_i7_parents_and_children_end_alike_when_their_lanes_differ(rig: Lanes, good: bool) -> None:
    # Given: parents, of which each has a child; half of the children are the other engine's
    kid: Saga[dict[str, Any]] = Saga("kid", dict)
    sink_step(kid, "k")
    parent: Saga[dict[str, Any]] = Saga("parent", dict)
    sink_step(parent, "a")
    parent.child(kid, name="sub")(lambda run: run.input).undo(lambda _session, _run: None)
    sink_step(parent, "z", kind="pivot")
    rig.deploy(kid)
    if not good:
        rig.sink.fate["k"] = POISON
    sagas = [rig.start(parent, {}) for _ in range(20)]
    # When: both engines work, and one dies on the way
    for number in (0, 1):
        rig.clock.step()
        rig[number].step()
        rig.sinker.step()
        rig.kill(number)
    rig.settle()
    # Then: each parent is what its child is
    rows = rig.admin.execute(
        "select p.id, p.state, c.id, c.state from outbox.saga c join outbox.saga p on p.id = c.parent"
    ).fetchall()
    assert {row[0] for row in rows} == set(sagas)
    wanted = "completed" if good else "compensated"
    assert {(row[1], row[3]) for row in rows} == {(wanted, wanted)}
    assert len({(rig.lane_of(row[0]), rig.lane_of(row[2])) for row in rows}) == LANES**2, "every mixture was there"
    assert rig.done().count("a") == rig.done().count("z" if good else "undo a") == len(sagas)


def test_saga_locks_are_held_by_one_at_a_time_when_those_that_want_it_are_in_several_lanes(rig: Lanes) -> None:
    # Given: sagas of both lanes that want one lock
    saga = locking("one")
    sagas = [rig.start(saga, {"lock": "x"}) for _ in range(12)]
    assert {rig.lane_of(one) for one in sagas} == set(range(LANES))
    rig.settle()
    # When: whoever holds it goes on, one after another; some give up while they wait
    seen = []
    while True:
        held = rig.admin.execute("select saga from outbox.saga_lock where held").fetchall()
        if not held:
            break
        ((holder,),) = held
        states = rig.admin.execute("select id from outbox.saga where state = 'running'").fetchall()
        assert states == [(holder,)], "one works, and it is the holder"
        seen.append(holder)
        rig.signal(holder, "go")
        if len(seen) % 3 == 0 and (waiting := set(sagas) - set(seen)):
            rig.cancel(min(waiting))
        rig.settle()
    # Then: everyone had it, or gave up before
    ends = {one: rig.state(one) for one in sagas}
    assert {one for one, state in ends.items() if state == "completed"} == set(seen)
    assert set(ends.values()) == {"completed", "compensated"}
    assert rig.admin.execute("select count(*) from outbox.saga_lock").fetchone() == (0,)


def test_saga_is_refused_when_two_families_of_several_lanes_would_wait_for_each_other(rig: Lanes) -> None:
    # Given: two parents that each hold what the other's child wants
    kid = Saga("kid", dict, locks=lambda value: [value["wants"]])
    function_steps(kid, "k")
    parent = Saga("parent", dict, locks=lambda value: [value["holds"]])
    parent.signal("go", timeout=3600.0)
    parent.child(kid, name="sub")(lambda run: run.input).undo(lambda _session, _run: None)
    rig.deploy(kid, parent)
    first: list[UUID] = []
    while len({rig.lane_of(one) for one in first[-2:]}) < LANES:
        # A pair whose parents are in different lanes.
        n = len(first)
        first += [
            rig.start(parent, {"holds": f"x{n}", "wants": f"y{n}"}),
            rig.start(parent, {"holds": f"y{n}", "wants": f"x{n}"}),
        ]
    rig.settle()
    # When: both go on to their children
    for one in first:
        rig.signal(one, "go")
    rig.settle()
    # Then: of each pair one gives way, and the other completes
    for n in range(0, len(first), 2):
        assert sorted(rig.state(one) for one in first[n : n + 2]) == ["compensated", "completed"]
    reasons = rig.admin.execute("select reason from outbox.saga where name = 'kid' and state = 'compensated'")
    assert all("would wait for itself" in reason for (reason,) in reasons)


def test_saga_i3_timers_ring_once_when_there_are_several_lanes(rig: Lanes) -> None:
    # Given: sagas of both lanes that sleep
    saga: Saga[dict[str, Any]] = Saga("sleeps", dict)
    saga.delay("nap", 30.0)
    function_steps(saga, "f")
    sagas = [rig.start(saga, {}) for _ in range(12)]
    assert {rig.lane_of(one) for one in sagas} == set(range(LANES))
    rig.settle()
    # When: their time has come
    rig.admin.execute("update outbox.saga_timer set due = outbox.now() - interval '1 s'")
    rig.settle()
    # Then: each engine rang those of its own
    assert {rig.state(one) for one in sagas} == {"completed"}
    rang = rig.admin.execute("select key, count(*) from outbox.log where action = 'timer' group by key").fetchall()
    assert dict(rang) == {str(one): 1 for one in sagas}
