"""What a definition says beyond its steps, as the engine keeps it: typed input, a deadline, a target of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Retry, Saga
from outbox.participant import Outcome, Verdict
from tests.fixtures.sagas import Rig, function_step, sink_step

POISON = Outcome(Verdict.POISON, error="it can't be done")


@dataclass
class Leg:
    flight: str
    at: datetime


@dataclass
class Trip:
    who: str
    legs: list[Leg]
    price: Decimal = Decimal(0)


@dataclass
class Journey:
    """A later `Trip`, with one more field that has a default."""

    who: str
    legs: list[Leg]
    price: Decimal = Decimal(0)
    notes: list[str] = field(default_factory=list)


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_saga_gives_its_steps_the_input_that_it_was_started_with(rig: Rig) -> None:
    # Given: an input with dataclasses, times and decimal numbers in it
    seen: list[Trip] = []
    saga = Saga("trip", Trip)

    @saga.function
    def book(session: Session, run: Any) -> None:
        seen.append(run.input)

    @book.undo
    def unbook(session: Session, run: Any) -> None:
        seen.append(run.input)

    sink_step(saga, "wait")
    started = rig.start(saga, trip := Trip("ann", [Leg("x1", NOON)], Decimal("9.90")))
    # When: a step runs, and, in another process and from what is stored, its compensation
    rig.settle(sink=False)
    rig.kill_engine()
    rig.cancel(started)
    rig.settle()
    # Then: both are given the same values, of the same types
    assert rig.state(started) == "compensated"
    assert seen == [trip, trip]
    assert repr(seen) == repr([trip, trip])


def test_saga_continues_when_its_input_has_a_new_field_with_a_default_and_not_when_it_lacks_one(rig: Rig) -> None:
    def made(kind: Any) -> Saga[Any]:
        saga: Saga[Any] = Saga("trip", kind)
        sink_step(saga, "a")
        sink_step(saga, "b")
        return saga

    # Given: a saga under way
    started = rig.start(made(Trip), Trip("ann", []))
    rig.settle(sink=False)
    # When: code is deployed whose input needs something else, Then: it is left alone
    rig.kill_engine()
    rig.definitions.clear()
    rig.deploy(made(Leg))
    for reader in (rig.sinker, rig.engine):
        rig.clock.step()
        reader.step()
    assert rig.state(started) == "running"
    # When: code with one more field that has a default, Then: it goes on
    rig.kill_engine()
    rig.definitions.clear()
    rig.deploy(made(Journey))
    rig.settle()
    assert rig.state(started) == "completed"


def test_saga_start_waits_for_code_that_can_read_its_input(rig: Rig) -> None:
    # Given: an application that is ahead of the engine
    ahead: Saga[Any] = Saga("trip", Journey)
    behind: Saga[Any] = Saga("trip", Trip)
    for saga in (ahead, behind):
        sink_step(saga, "a")
    rig.deploy(behind)
    with rig.sessions.begin() as session:
        started = ahead.start(session, Journey("ann", [], notes=["window"]))
    # When: the engine reads the start, Then: it waits, and says for what
    rig.clock.step()
    rig.engine.step()
    assert rig.state(started) == "none"
    (error,) = rig.admin.execute("select error from outbox.parked").fetchone() or ("",)
    assert "has no field 'notes'" in error
    # When: the engine is deployed too, Then: it runs
    rig.kill_engine()
    rig.definitions.clear()
    rig.deploy(ahead)
    rig.settle()
    assert rig.state(started) == "completed"


def timed() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("timed", dict, deadline=3600)
    sink_step(saga, "a")
    sink_step(saga, "p", kind="pivot")
    sink_step(saga, "r", kind="retriable")
    return saga


def test_saga_i7_goes_back_when_its_deadline_passes_before_the_pivot(rig: Rig) -> None:
    started = rig.start(timed(), {})
    rig.settle(sink=False)
    rig.later(3599)
    rig.settle(sink=False)
    assert rig.state(started) == "running"
    rig.later(2)
    rig.settle()
    assert rig.state(started) == "compensated"
    assert "deadline" in rig.reason(started)
    assert rig.done() in ([], ["a", "undo a"])


def test_saga_i7_keeps_going_forward_when_its_deadline_passes_after_the_pivot(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("timed", dict, deadline=3600)
    function_step(saga, "p", kind="pivot")
    sink_step(saga, "r", kind="retriable")
    started = rig.start(saga, {})
    rig.settle(sink=False)
    rig.later(3601)
    rig.settle()
    assert rig.state(started) == "completed"
    assert rig.done() == ["r"]
    (detail,) = rig.admin.execute("select detail from outbox.saga_event where what = 'refused'").fetchone() or ("",)
    assert "the pivot is done" in detail


def test_saga_leaves_no_timer_behind_when_it_ends_before_its_deadline(rig: Rig) -> None:
    at_once: Saga[dict[str, Any]] = Saga("at-once", dict, deadline=3600, locks=lambda _input: ["x"])
    function_step(at_once, "f")
    for saga in (timed(), at_once):
        started = rig.start(saga, {})
        rig.settle()
        assert rig.state(started) == "completed"
    assert (
        rig.admin.execute("select step from outbox.saga_timer where what = 'timeout' and step = '*'").fetchall() == []
    )


def test_saga_i7_deadline_gives_up_the_wait_for_locks(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("locked", dict, deadline=60, locks=lambda _input: ["x"])
    sink_step(saga, "a")
    first = rig.start(saga, {})
    second = rig.start(saga, {})
    rig.settle(sink=False)
    assert rig.state(second) == "waiting"
    rig.later(61)
    rig.settle()
    assert (rig.state(first), rig.state(second)) == ("compensated", "compensated")
    assert rig.done() in ([], ["a", "undo a"])


def test_saga_i7_sends_no_mail_before_the_pivot_when_an_intent_step_makes_one(rig: Rig) -> None:
    # Given: a mail that the linter can't see
    saga: Saga[dict[str, Any]] = Saga("sneaky", dict)

    @saga.intent(retry=Retry(attempts=1))
    def tell(run: Any) -> Any:
        return run.mail.send(sender="a@example.org", to="b@example.org", subject="s", text="t")

    @tell.undo
    def untell(run: Any) -> Any:
        return run.emit("sink", "put", "x", "sorry")

    # When: it runs
    started = rig.start(saga, {})
    rig.settle()
    # Then: nothing was sent, and the reason says how it is done
    assert rig.state(started) == "compensated"
    assert "declare it with .mail" in rig.reason(started)
    assert rig.admin.execute("select count(*) from outbox.log where target = 'mail'").fetchone() == (0,)


def test_saga_step_is_an_intent_for_any_participant(rig: Rig) -> None:
    """Also for one that the product doesn't know: what counts is that it is registered."""
    saga: Saga[dict[str, Any]] = Saga("any", dict)
    sink_step(saga, "known")

    @saga.intent(kind="pivot", irreversible=True)
    def unknown(run: Any) -> Any:
        return run.emit("nobody", "send", "k", {"args": [1]})

    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert "there is no participant 'nobody'" in rig.reason(started)
    rig.admin.execute("select outbox.register('nobody')")
    again = rig.start(saga, {})
    rig.settle()
    assert rig.steps(again) == {"known": "done", "unknown": "running"}
    with rig.sessions() as session:
        assert session.execute(sa.text("select outbox.saga_state(:id)"), {"id": again}).scalar() == "running"


class Died(BaseException):
    """The engine was killed here."""


@pytest.mark.parametrize("way", ["forward", "back"])
def test_saga_i3_makes_one_try_of_a_timer_when_the_engine_dies_after_its_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # Given: an intent that has failed for good, and is made anew when its timer rings
    saga: Saga[dict[str, Any]] = Saga("again", dict)
    made = saga.intent(name="a", retry=Retry(attempts=5, first=10.0))(lambda run: run.emit("sink", "put", "a", "a"))
    made.undo(lambda run: run.emit("sink", "put", "undo a", "undo a"))
    sink_step(saga, "p", kind="pivot")
    sink_step(saga, "r", kind="retriable", retry=Retry(attempts=5, first=10.0))
    failing = "r" if way == "forward" else "undo a"
    rig.sink.fate[failing] = POISON
    if way == "back":
        rig.sink.fate["p"] = POISON
    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == ("completing" if way == "forward" else "compensating")
    # When: the engine has committed what follows from the timer, and dies before its position is written
    rig.sink.fate.clear()
    rig.later(11)

    def dies(name: str) -> None:
        if name == "saga.committed":
            raise Died

    monkeypatch.setattr("workers.engine.hit", dies)
    for _ in range(10):
        rig.clock.step()
        try:
            rig.engine.step()
        except Died:
            break
    else:
        raise AssertionError("the engine never came to its timer")
    monkeypatch.undo()
    rig.kill_engine()
    # Then: the next one reads the timer again, and makes no second try of it
    rig.settle()
    assert rig.state(started) == ("completed" if way == "forward" else "compensated")
    assert rig.done().count(failing) == 1
