"""What is recalled from a worker that died, failed or waits: its saga gets a true answer, whatever it was."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import workers.engine
from outbox import Saga
from outbox import lane as lanes
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step, sink_step

POISON = Outcome(Verdict.POISON, error="it can't be done")
RETRY = Outcome(Verdict.RETRY, error="not now")


class Killed(BaseException):
    """The worker dies here."""


def die_unrecorded(rig: Rig) -> None:
    """The sink's worker applies what it has, and dies before that is written down."""

    def dies(*_: Any) -> None:
        raise Killed

    rig.sinker._record = dies  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        while rig.sinker.step():
            pass
    rig.kill_sink()


@pytest.mark.parametrize("keeps_position", [False, True])
@pytest.mark.parametrize("pivot", [False, True])
def test_saga_i7_is_either_or_when_it_is_cancelled_after_an_effect_that_nobody_recorded(
    rig: Rig, keeps_position: bool, pivot: bool
) -> None:
    # Given: an effect, whose worker died before it recorded that
    rig.sink.keeps_position = keeps_position
    saga: Saga[dict[str, Any]] = Saga("late", dict)
    sink_step(saga, "a", kind="pivot" if pivot else "compensatable")
    if pivot:
        sink_step(saga, "b", kind="retriable")
    started = rig.start(saga, {})
    rig.settle(sink=False)
    if keeps_position:
        rig.sink.own = lanes.Lane.stand(rig.sinker.lane, rig.conn)
    die_unrecorded(rig)
    assert rig.done() == ["a"]
    # When: the saga is cancelled, and its intent recalled, before the next worker comes
    rig.cancel(started)
    rig.settle(sink=False)
    assert rig.steps(started)["a"] == "recalled"
    rig.settle()
    # Then: the effect is known, and counts
    state, last = ("completed", "b") if pivot else ("compensated", "undo a")
    assert rig.state(started) == state
    assert rig.done()[-1] == last
    # A sink that is rebuilt from the log applies it as well.
    assert rig.admin.execute("select count(*) from outbox.saga_void").fetchone() == (0,)


def test_saga_i2_hears_of_an_effect_that_nobody_recorded_when_its_intent_was_a_straggler(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id is below the position that is recorded, because its transaction ended after a later one's."""
    # Given: a sink that keeps its own position, and an engine that is slow to commit: meanwhile, another intent with
    # a higher id is applied, and that is recorded
    rig.sink.keeps_position = True
    rig.sink.batch_limit = 1
    saga: Saga[dict[str, Any]] = Saga("straggler", dict)
    sink_step(saga, "a")
    rig.deploy(saga)
    rig.clock.step()
    rig.sink.own = lanes.Lane.stand(rig.sinker.lane, rig.conn)
    others: list[int] = []

    def slow(name: str) -> None:
        if name == "saga.written" and not others:
            others.append(rig.emit("other", "other"))
            rig.clock.step()
            while rig.sinker.step():
                pass

    monkeypatch.setattr(workers.engine, "hit", slow)
    started = rig.start(saga, {})
    rig.clock.step()
    while rig.engine.step():
        pass
    row = rig.admin.execute("select intent from outbox.saga_step where step = 'a'").fetchone()
    assert row is not None
    assert row[0] < others[0]
    # When: the sink's worker applies it, and dies before that is recorded
    rig.clock.step()
    die_unrecorded(rig)
    assert rig.done() == ["other", "a"]
    rig.settle()
    # Then
    assert rig.state(started) == "completed"
    assert rig.done() == ["other", "a"]


def test_saga_i3_recalled_intent_is_not_applied_when_its_worker_died_after_it_had_answered(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("answered", dict)
    sink_step(saga, "a")
    started = rig.start(saga, {})
    rig.emit("other")
    _ = rig.sinker
    rig.settle(sink=False)
    rig.cancel(started)
    rig.settle(sink=False)
    # Given: a worker that has said that the intent is void, and died before its position was written
    die_unrecorded(rig)
    # When
    rig.settle()
    # Then
    assert rig.state(started) == "compensated"
    assert "a" not in rig.done()
    assert "undo a" not in rig.done()


def test_saga_i7_parked_effect_counts_when_its_worker_died_before_it_was_recorded(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("parked", dict)
    sink_step(saga, "a")
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["a"] = RETRY
    started = rig.start(saga, {})
    rig.settle()
    assert rig.parked() == {"retry": ["a"]}
    # Given: it is tried again, with success, and its worker dies
    rig.sink.fate.clear()
    rig.admin.execute("update outbox.parked set retry_at = outbox.now() where key = 'a'")
    reader, apply = rig.sinker, rig.sink.apply

    def dies(*args: Any) -> Any:
        apply(*args)
        raise Killed

    rig.sink.apply = dies  # type: ignore[method-assign, assignment]
    reader._parked_at = -10.0
    with pytest.raises(Killed):
        reader.step()
    rig.sink.apply = apply  # type: ignore[method-assign]
    assert rig.done() == ["a"]
    rig.kill_sink()
    # When
    rig.cancel(started)
    rig.settle(sink=False)
    rig.admin.execute("update outbox.parked set retry_at = outbox.now() where key = 'a'")
    rig.settle()
    # Then
    assert rig.state(started) == "compensated"
    assert rig.done()[-1] == "undo a"


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize("child", [False, True])
def test_saga_i7_goes_back_when_a_function_that_makes_an_intent_is_between_two_tries(
    rig: Rig, how: str, child: bool
) -> None:
    saga: Saga[dict[str, Any]] = Saga("maker", dict)
    sink_step(saga, "a")

    def make(_run: Any) -> Any:
        raise ValueError("not now")

    if child:
        other: Saga[dict[str, Any]] = Saga("other", dict)
        sink_step(other, "c")
        b = saga.child(other, name="b", timeout=1300.0, retry=Retry(first=1000.0))(make)
        b.undo(lambda _session, _run: None)
    else:
        b = saga.intent(name="b", timeout=1300.0, retry=Retry(first=1000.0))(make)
        b.undo(make)
    started = rig.start(saga, {})
    rig.settle()
    assert rig.steps(started)["b"] == "running"
    if how == "cancel":
        rig.cancel(started)
    else:
        rig.later(1301)
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.done() == ["a", "undo a"]


def test_saga_recalled_intent_is_withdrawn_when_it_waits_behind_somebody_elses(rig: Rig) -> None:
    rig.sink.fate["k"] = POISON
    rig.emit("k", "of somebody")
    saga: Saga[dict[str, Any]] = Saga("behind", dict)
    sink_step(saga, "a")
    sink_step(saga, "b", key="k")
    started = rig.start(saga, {})
    rig.settle()
    assert rig.parked() == {"poison": ["k"], "blocked": ["k"]}
    rig.cancel(started)
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.parked() == {"poison": ["k"]}
    assert rig.done() == ["a", "undo a"]


def test_saga_i4_operator_s_word_on_an_undo_under_way_is_not_taken_for_a_failed_try(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("undoing", dict)
    function_step(saga, "f")

    @saga.function(retry=Retry(attempts=2, first=1000.0))
    def g(_session: Session, _run: Any) -> None:
        """It does nothing."""

    calls: list[int] = []

    @g.undo
    def ungo(session: Session, _run: Any) -> None:
        calls.append(session.execute(sa.text("select 1")).scalar_one())
        if len(calls) < 3:
            raise ValueError("not now")

    saga.signal("wait", timeout=3600)
    started = rig.start(saga, {})
    rig.settle()
    rig.cancel(started)
    rig.settle()
    assert rig.steps(started)["g"] == "undoing"
    rig.ask(started, "resolve", step="g", happened=False, who="ann")
    rig.settle()
    # One failed try of the new round, and not two.
    assert rig.admin.execute("select state, tries from outbox.saga_step where step = 'g'").fetchone() == ("undoing", 1)


@pytest.mark.parametrize("parked", [False, True])
def test_saga_i7_undoes_an_effect_that_nobody_recorded_when_the_next_worker_is_refused(rig: Rig, parked: bool) -> None:
    """A participant may say no to what it has already."""
    saga: Saga[dict[str, Any]] = Saga("refused", dict)
    step = saga.intent(name="a")(lambda run: run.emit("sink", "put", "a", "a"))
    step.undo(lambda run: run.emit("sink", "put", "u", "undo a"))
    if parked:
        rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
        rig.sink.fate["a"] = RETRY._replace(untouched=True)
    started = rig.start(saga, {})
    rig.settle(sink=parked)
    # Given: an effect, at the first try or at another one, whose worker died before it was recorded
    if parked:
        assert rig.parked() == {"retry": ["a"]}
        rig.sink.fate.clear()
        rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
        rig.sinker._attempts.record = _dies  # type: ignore[method-assign, assignment]
        rig.sinker._parked_at = -10.0
        with pytest.raises(Killed):
            rig.sinker.step()
        rig.kill_sink()
        rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
    else:
        die_unrecorded(rig)
    assert rig.done() == ["a"]
    # When: the next one is refused
    rig.sink.fate["a"] = POISON
    rig.settle()
    # Then
    assert rig.state(started) == "compensated"
    assert rig.done() == ["a", "undo a"]


def _dies(*_: Any) -> None:
    raise Killed
