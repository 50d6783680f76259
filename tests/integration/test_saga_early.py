"""Signals and cancels that come before their saga: kept for its start, which takes them along in order."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox import Saga
from tests.fixtures.sagas import Rig, function_step, sink_step


def approved() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("approved", dict)
    sink_step(saga, "a")
    saga.signal("approval", timeout=3600)
    sink_step(saga, "p", kind="pivot")
    return saga


def kept(rig: Rig) -> int:
    row = rig.admin.execute("select count(*) from outbox.saga_early").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("apart", [False, True])
def test_saga_i2_takes_a_signal_along_that_came_before_its_start(rig: Rig, apart: bool) -> None:
    # Given: an approval, and a second one, for a saga that has not started
    saga = approved()
    rig.deploy(saga)
    number = saga.id_of("k")
    with rig.sessions.begin() as session:
        rig.outbox.signal(session, number, "approval", {"by": "ann"}, who="ann")
        rig.outbox.signal(session, number, "approval", {"by": "bob"}, accepted=False)
        if not apart:
            # In the same transaction, and before it: one batch.
            saga.start(session, {}, key="k")
    if apart:
        rig.settle()
        assert kept(rig) == 2
        assert rig.parked() == {}, "it would block the start"
        # When: it starts
        rig.start(saga, {}, key="k")
    rig.settle()
    # Then: it has the first one, and nothing is left of them
    assert rig.state(number) == "completed"
    row = rig.admin.execute("select result from outbox.saga_step where step = 'approval'").fetchone()
    assert row == ({"by": "ann"},)
    assert kept(rig) == 0
    assert rig.parked() == {}


def test_saga_i7_does_nothing_when_it_was_cancelled_before_its_start(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("cancelled", dict, locks=lambda _value: ["x"])
    function_step(saga, "f", kind="pivot")
    rig.deploy(saga)
    number = saga.id_of("k")
    rig.cancel(number, "never mind")
    rig.settle()
    rig.start(saga, {}, key="k")
    rig.settle()
    assert rig.state(number) == "compensated"
    assert rig.reason(number) == "cancelled: never mind"
    assert rig.things() == {}
    assert rig.admin.execute("select count(*) from outbox.saga_lock").fetchone() == (0,)


def test_saga_i3_keeps_a_signal_once_when_the_engine_dies_before_its_position_is_written(rig: Rig) -> None:
    saga = approved()
    rig.deploy(saga)
    number = saga.id_of("k")
    rig.signal(number, "approval", {"by": "ann"})
    rig.clock.step()
    # Given: the signal is kept, and the engine dies before its position says so
    rig.engine._record = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        while True:
            rig.engine.step()
    rig.kill_engine()
    assert kept(rig) == 1
    # When: another one reads it again, and the saga starts
    rig.settle()
    assert kept(rig) == 1
    rig.start(saga, {}, key="k")
    rig.settle()
    assert rig.state(number) == "completed"


def test_saga_signal_waits_for_a_start_that_is_set_aside_itself(rig: Rig) -> None:
    """A definition that isn't deployed yet: the start is tried again, and the signal behind it keeps its place."""
    saga = approved()
    number = saga.id_of("k")
    rig.signal(number, "approval", 1)
    with rig.sessions.begin() as session:
        saga.start(session, {}, key="k")
    rig.clock.step()
    rig.engine.step()
    assert rig.parked() == {"retry": [str(number)]}
    assert kept(rig) == 1
    rig.signal(number, "approval", 2, accepted=False)
    rig.deploy(saga)
    rig.settle()
    assert rig.state(number) == "completed"
    assert kept(rig) == 0


# No object, no name, and a number that Postgres takes and Python can't write again.
NONE = ("[1]", "{}", '{"name": "approval", "payload": 1' + "0" * 400 + ".5}")


@pytest.mark.parametrize("body", NONE, ids=("list", "nameless", "number"))
@pytest.mark.parametrize("early", [False, True])
def test_saga_signal_that_is_none_is_set_aside_and_disturbs_nobody(rig: Rig, body: str, early: bool) -> None:
    saga = approved()
    number = uuid4() if early else rig.start(saga, {})
    rig.settle()
    other = rig.start(saga, {})
    rig.admin.execute("select outbox.emit('saga', 'signal', %s, %s)", (str(number), body))
    rig.settle()
    assert rig.steps(other)["approval"] == "running"
    assert rig.parked() == {"poison": [str(number)]}
    # By itself, and at once: not because the batch failed with it, again and again.
    assert rig.admin.execute("select attempts from outbox.parked").fetchone() == (1,)
    assert kept(rig) == 0


def test_saga_signal_is_dropped_when_its_saga_never_started(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.signal(UUID(int=7), "approval")
    rig.settle()
    rig.later(29 * 86400)
    rig.engine.participant._expired_at = float("-inf")  # type: ignore[attr-defined]
    rig.settle()
    assert kept(rig) == 1
    rig.later(2 * 86400)
    rig.engine.participant._expired_at = float("-inf")  # type: ignore[attr-defined]
    rig.settle()
    assert kept(rig) == 0
    assert "never started" in caplog.text
