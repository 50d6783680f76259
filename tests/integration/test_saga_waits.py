"""Sagas that wait: for a time, a person, another saga, a lock. The clock is set, nothing sleeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from outbox import Saga, sql
from outbox.participant import Outcome, Verdict
from tests.fixtures.sagas import Rig, function_step, sink_step

POISON = Outcome(Verdict.POISON, error="it can't be done")


def approved() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("approved", dict)
    sink_step(saga, "a")
    saga.signal("approval", timeout=3600)
    sink_step(saga, "p", kind="pivot")
    return saga


def test_saga_goes_on_when_its_signal_comes_and_has_its_payload(rig: Rig) -> None:
    saga = rig.start(approved(), {})
    rig.settle()
    assert rig.steps(saga)["approval"] == "running"
    rig.signal(saga, "approval", {"by": "ann"}, who="ann")
    rig.settle()
    assert rig.state(saga) == "completed"
    row = rig.admin.execute("select result from outbox.saga_step where step = 'approval'").fetchone()
    assert row == ({"by": "ann"},)


def test_saga_takes_a_signal_that_came_before_its_step_and_only_the_first(rig: Rig) -> None:
    saga = rig.start(approved(), {})
    rig.settle(sink=False)
    rig.signal(saga, "approval", 1)
    rig.signal(saga, "approval", 2, accepted=False)
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.admin.execute("select result from outbox.saga_step where step = 'approval'").fetchone() == (1,)


def test_saga_i7_goes_back_when_an_approval_is_refused(rig: Rig) -> None:
    saga = rig.start(approved(), {})
    rig.settle()
    rig.signal(saga, "approval", accepted=False)
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]
    assert rig.reason(saga) == "step 'approval' failed: refused"


def test_saga_i7_goes_back_when_its_signal_does_not_come_in_time(rig: Rig) -> None:
    saga = rig.start(approved(), {})
    rig.settle()
    rig.later(3599)
    rig.settle()
    assert rig.state(saga) == "running"
    rig.later(2)
    rig.settle()
    assert rig.state(saga) == "compensated"
    rig.signal(saga, "approval")
    rig.settle()
    assert rig.done() == ["a", "undo a"]


def test_saga_delay_ends_at_its_time(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("delayed", dict)
    sink_step(saga, "a")
    saga.delay("night", 8 * 3600)
    sink_step(saga, "b")
    started = rig.start(saga, {})
    rig.settle()
    assert rig.done() == ["a"]
    rig.later(8 * 3600 + 1)
    rig.settle()
    assert rig.state(started) == "completed"
    assert rig.done() == ["a", "b"]


# ------------------------------------------------------------------------------------------------- children


def family() -> tuple[Saga[dict[str, Any]], Saga[dict[str, Any]]]:
    child: Saga[dict[str, Any]] = Saga("child", dict)
    sink_step(child, "c1")
    sink_step(child, "c2")
    parent: Saga[dict[str, Any]] = Saga("parent", dict)
    sink_step(parent, "p1")

    @parent.child(child)
    def sub(run: Any) -> dict[str, Any]:
        return {"from": str(run.id)}

    @sub.undo
    def undo_sub(_session: Any, run: Any) -> None:
        assert run.results["sub"]["saga"]

    sink_step(parent, "p2")
    return parent, child


def test_saga_goes_on_when_its_child_has_completed(rig: Rig) -> None:
    parent, _child = family()
    saga = rig.start(parent, {})
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.done() == ["p1", "c1", "c2", "p2"]
    rows = rig.admin.execute("select state, parent from outbox.saga where name = 'child'").fetchall()
    assert rows == [("completed", saga)]


def test_saga_i7_goes_back_when_its_child_was_compensated(rig: Rig) -> None:
    parent, _child = family()
    rig.sink.fate["c2"] = POISON
    saga = rig.start(parent, {})
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["p1", "c1", "undo c1", "undo p1"]


def test_saga_i7_cancels_its_child_when_it_is_cancelled(rig: Rig) -> None:
    parent, _child = family()
    rig.sink.fate["c2"] = Outcome(Verdict.RETRY, error="not now", untouched=True)
    saga = rig.start(parent, {})
    for _ in range(40):
        rig.clock.step()
        rig.engine.step()
        rig.sinker.step()
    assert rig.done() == ["p1", "c1"]
    rig.cancel(saga)
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["p1", "c1", "undo c1", "undo p1"]
    assert rig.admin.execute("select distinct state from outbox.saga").fetchall() == [("compensated",)]


# --------------------------------------------------------------------------------------------------- locks


@dataclass
class Folder:
    path: str


def locking(name: str = "locking", *, timeout: float = 60.0) -> Saga[Folder]:
    saga = Saga(name, Folder, locks=lambda folder: [f"folder/{folder.path}"], lock_timeout=timeout)
    saga.signal("go", timeout=3600)
    sink_step(saga, "a")
    return saga


def test_saga_waits_for_a_lock_until_its_holder_has_ended(rig: Rig) -> None:
    saga = locking()
    first, second, other = (rig.start(saga, Folder(path)) for path in ("x", "x", "y"))
    rig.settle()
    assert [rig.state(one) for one in (first, second, other)] == ["running", "waiting", "running"]
    rig.signal(first, "go")
    rig.settle()
    assert [rig.state(one) for one in (first, second, other)] == ["completed", "running", "running"]
    rig.signal(second, "go")
    rig.signal(other, "go")
    rig.settle()
    assert [rig.state(one) for one in (first, second, other)] == ["completed"] * 3
    assert rig.admin.execute("select count(*) from outbox.saga_lock").fetchone() == (0,)


def test_saga_locks_are_given_in_the_order_they_were_asked_for(rig: Rig) -> None:
    saga = locking()
    several = [rig.start(saga, Folder("x")) for _ in range(4)]
    rig.settle()
    for n, one in enumerate(several):
        assert [rig.state(other) for other in several[n:]] == ["running"] + ["waiting"] * (3 - n)
        rig.cancel(one)
        rig.settle()
        assert rig.state(one) == "compensated"


def test_saga_gives_up_when_its_lock_is_not_free_in_time(rig: Rig) -> None:
    saga = locking()
    first, second = rig.start(saga, Folder("x")), rig.start(saga, Folder("x"))
    rig.settle()
    rig.later(61)
    rig.settle()
    assert rig.state(first) == "running"
    assert rig.state(second) == "compensated"
    assert "locks were not free in time" in rig.reason(second)
    assert rig.admin.execute("select count(*) from outbox.saga_lock").fetchone() == (1,)


def test_saga_is_refused_when_its_lock_would_wait_for_its_own_parent(rig: Rig) -> None:
    child = locking("kid")
    parent = Saga("holder", Folder, locks=lambda folder: [f"folder/{folder.path}"])
    function_step(parent, "f")

    @parent.child(child)
    def sub(run: Any) -> Folder:
        return Folder(run.input.path)

    sub.undo(lambda _session, _run: None)
    saga = rig.start(parent, Folder("x"))
    rig.settle()
    assert rig.state(saga) == "compensated"
    reason = rig.admin.execute("select reason from outbox.saga where name = 'kid'").fetchone()
    assert reason is not None
    assert "would wait for itself" in reason[0]
    assert rig.things() == {}


# ------------------------------------------------------------------------------------------------- versions


def test_saga_waits_when_its_definition_is_not_deployed_and_goes_on_when_it_is(rig: Rig) -> None:
    saga = approved()
    started = rig.start(saga, {})
    rig.settle()
    rig.kill_engine()
    rig.definitions.clear()
    rig.signal(started, "approval")
    for _ in range(5):
        rig.clock.step()
        rig.engine.step()
    assert rig.state(started) == "running"
    assert list(rig.parked()) == ["retry"]
    rig.kill_engine()
    rig.deploy(saga)
    rig.settle()
    assert rig.state(started) == "completed"


@pytest.mark.parametrize("changed", [False, True])
def test_saga_continues_as_it_was_started_when_there_is_a_newer_version(rig: Rig, changed: bool) -> None:
    old = approved()
    started = rig.start(old, {})
    rig.settle()
    new: Saga[dict[str, Any]] = Saga("approved", dict, version=1 if changed else 2)
    function_step(new, "other")
    rig.kill_engine()
    if changed:
        rig.definitions.clear()  # the same version, with other steps
    rig.deploy(new)
    rig.signal(started, "approval")
    for _ in range(20):
        rig.clock.step()
        rig.engine.step()
        rig.sinker.step()
    assert rig.state(started) == ("running" if changed else "completed")
    from outbox.saga import view

    lacking = view.uncontinued(rig.admin, rig.definitions)
    assert [(row["name"], row["version"], row["sagas"]) for row in lacking] == ([("approved", 1, 1)] if changed else [])


def test_saga_locks_are_given_on_by_two_statements_however_many_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the queue's heads is told, the one that waited longest first; those behind it cost nothing."""
    saga = locking()
    holders = [rig.start(saga, Folder(path)) for path in "xyz"]
    rig.settle()
    waiting = {path: [rig.start(saga, Folder(path)) for _ in range(10)] for path in "zyx"}
    rig.settle()
    asked: list[str] = []
    load = sql.load

    def noted(name: str) -> Any:
        asked.append(name)
        return load(name)

    monkeypatch.setattr(sql, "load", noted)
    for holder in holders:
        rig.signal(holder, "go")
    rig.settle()
    # Whatever was asked for locks alone, when three ended in one batch: given back, and given on.
    assert [name for name in asked if name.startswith("saga_lock")] == ["saga_lock_drop", "saga_lock_grant"]
    heads = [several[0] for several in waiting.values()]
    assert [rig.state(one) for one in heads] == ["running"] * 3
    others = [one for several in waiting.values() for one in several[1:]]
    assert {rig.state(one) for one in others} == {"waiting"}
    told = rig.admin.execute("select key from outbox.log where action = 'granted' order by id").fetchall()
    assert [row[0] for row in told] == [str(one) for one in heads], "in the order in which they began to wait"


def test_saga_waits_for_all_of_its_locks_when_one_of_them_is_given_on(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("many", dict, locks=lambda value: value["locks"])
    saga.signal("go", timeout=3600)
    first, second = (rig.start(saga, {"locks": [name]}) for name in ("x", "y"))
    both = rig.start(saga, {"locks": ["x", "y"]})
    third = rig.start(saga, {"locks": ["x"]})
    rig.settle()
    rig.signal(first, "go")
    rig.settle()
    # The head of x's queue waits for y, and nobody overtakes it.
    assert [rig.state(one) for one in (both, third)] == ["waiting", "waiting"]
    rig.signal(second, "go")
    rig.settle()
    assert [rig.state(one) for one in (both, third)] == ["running", "waiting"]
