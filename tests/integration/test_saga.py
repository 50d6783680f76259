"""Sagas against a real Postgres: declared, started, completed or compensated, by a real engine and a real reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Saga
from outbox import lane as lanes
from outbox.errors import Permanent
from outbox.participant import APPLIED, Outcome, Verdict
from outbox.retry import Backoff
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step, sink_step

POISON = Outcome(Verdict.POISON, error="it can't be done")
RETRY = Outcome(Verdict.RETRY, error="not now")


def three() -> Saga[dict[str, Any]]:
    """a (sink), b (function), c (sink), in a row."""
    saga: Saga[dict[str, Any]] = Saga("three", dict)
    sink_step(saga, "a")
    function_step(saga, "b")
    sink_step(saga, "c")
    return saga


# ------------------------------------------------------------------------------------ start and the plain way


def test_saga_i7_completes_when_every_step_succeeds(rig: Rig) -> None:
    saga = rig.start(three(), {"n": 1})
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.done() == ["a", "c"]
    assert rig.things() == {"b": 1}
    assert set(rig.steps(saga).values()) == {"done"}


def test_saga_i1_does_not_start_when_the_transaction_is_rolled_back(rig: Rig) -> None:
    three_steps = three()
    rig.deploy(three_steps)
    with rig.sessions() as session:
        saga = three_steps.start(session, {})
        session.rollback()
    rig.settle()
    assert rig.state(saga) == "none"
    assert rig.done() == []


def test_saga_i3_starts_once_when_it_is_started_twice_with_one_key(rig: Rig) -> None:
    three_steps = three()
    first = rig.start(three_steps, {"n": 1}, key="folder/7")
    second = rig.start(three_steps, {"n": 2}, key="folder/7")
    rig.settle()
    third = rig.start(three_steps, {"n": 3}, key="folder/7")
    rig.settle()
    assert first == second == third
    assert rig.done() == ["a", "c"]
    assert rig.admin.execute("select input, key from outbox.saga").fetchall() == [({"n": 1}, "folder/7")]


def test_saga_notes_that_it_was_started_again_when_the_input_is_another(rig: Rig) -> None:
    saga = three()
    started = rig.start(saga, {"n": 1}, key="k")
    rig.start(saga, {"n": 1}, key="k")
    rig.settle()
    count = "select count(*) from outbox.saga_event where what = 'started again'"
    assert rig.admin.execute(count).fetchone() == (0,)
    rig.start(saga, {"n": 2}, key="k")
    rig.settle()
    assert rig.admin.execute(count + " and saga = %s", (started,)).fetchone() == (1,)


def test_saga_hands_results_to_later_steps_and_to_compensations(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("results", dict)
    seen: dict[str, Any] = {}
    sink_step(saga, "a")
    made = function_step(saga, "b")

    @saga.function(after=made)
    def c(_session: Session, run: Any) -> None:
        seen["forward"] = dict(run.results)
        raise Permanent("no")

    @c.undo
    def no(_session: Session, _run: Any) -> None:
        """Never called: c did not happen."""

    @made.undo
    def unmake(session: Session, run: Any) -> None:
        seen["back"] = (dict(run.results), run.reason)
        session.execute(sa.text("delete from thing"))

    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert seen["forward"] == {"b": {"made": "b"}}
    assert seen["back"] == ({"b": {"made": "b"}}, "step 'c' failed: no")


# -------------------------------------------------------------------------------------------------- going back


def test_saga_i7_is_undone_in_reverse_order_when_a_participant_refuses_for_good(rig: Rig) -> None:
    rig.sink.fate["c"] = POISON
    saga = rig.start(three(), {})
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]
    assert rig.things() == {}
    assert rig.steps(saga) == {"a": "undone", "b": "undone", "c": "failed"}
    assert rig.reason(saga) == "step 'c' failed: it can't be done"


def test_saga_i2_leaves_nothing_parked_when_its_intent_is_refused(rig: Rig) -> None:
    """The saga sees to it; a parked intent would block the compensation of the same key for ever."""
    saga: Saga[dict[str, Any]] = Saga("one-key", dict)
    sink_step(saga, "a", key="k")
    sink_step(saga, "b", key="k")
    rig.sink.fate["k"] = POISON
    rig.start(saga, {})
    rig.settle()
    assert rig.parked() == {}
    rig.emit("k", "later")
    rig.sink.fate.clear()
    rig.settle()
    assert rig.done() == ["later"]


def test_saga_function_is_rolled_back_alone_when_it_fails(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("half", dict)
    function_step(saga, "a")

    @saga.function
    def b(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into thing values ('half', 1)"))
        raise Permanent("half-way")

    b.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    other = rig.start(three(), {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.state(other) == "completed"
    assert rig.things() == {"b": 1}


def test_saga_function_fails_alone_when_a_deferred_constraint_would_fail_at_commit(rig: Rig) -> None:
    rig.admin.execute("create table late (n int unique deferrable initially deferred)")
    rig.admin.execute("grant all on late to app")
    saga: Saga[dict[str, Any]] = Saga("late", dict)

    @saga.function(retry=Retry(attempts=1))
    def a(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into late values (1), (1)"))

    a.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    other = rig.start(three(), {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.state(other) == "completed"


def test_saga_function_may_defer_constraints_when_an_earlier_one_was_checked(rig: Rig) -> None:
    rig.admin.execute("create table late (n int unique deferrable initially deferred)")
    rig.admin.execute("grant all on late to app")
    saga: Saga[dict[str, Any]] = Saga("swap", dict)

    @saga.function
    def a(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into late values (1), (2)"))

    @saga.function
    def b(session: Session, _run: Any) -> None:
        session.execute(sa.text("update late set n = 2 where n = 1"))
        session.execute(sa.text("update late set n = 1 where ctid = (select min(ctid) from late)"))

    for step in (a, b):
        step.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "completed"


def test_saga_function_is_tried_again_when_it_fails_for_now(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("again", dict)
    tries = []

    @saga.function(retry=Retry(attempts=3, first=10.0))
    def a(_session: Session, _run: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError("later")

    a.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    for _ in range(2):
        rig.settle()
        assert rig.state(started) == "running"
        rig.later(60)
    rig.settle()
    assert rig.state(started) == "completed"
    assert len(tries) == 3


def test_saga_i7_is_stuck_when_a_compensation_keeps_failing_and_others_go_on(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("stuck", dict)
    first = sink_step(saga, "a", after=(), retry=Retry(attempts=2, first=10.0))
    second = sink_step(saga, "b", after=())
    sink_step(saga, "c", after=(first, second))
    rig.sink.fate["c"] = POISON
    started = rig.start(saga, {})
    rig.settle(sink=False)
    rig.sinker.step()
    rig.sink.fate["a"] = POISON  # from now on: its compensation
    rig.settle()
    rig.later(60)
    rig.settle()
    assert rig.state(started) == "stuck"
    assert rig.steps(started) == {"a": "stuck", "b": "undone", "c": "failed"}
    assert rig.reason(started) == "step 'a' is stuck: it can't be done"
    # An operator sees to it.
    rig.sink.fate.clear()
    rig.ask(started, "retry", step="a", who="ann")
    rig.settle()
    assert rig.state(started) == "compensated"
    assert sorted(rig.done()) == ["a", "b", "undo a", "undo b"]


# --------------------------------------------------------------------------------------- the pivot, cancelling


def pivoted() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("pivoted", dict)
    sink_step(saga, "a")
    sink_step(saga, "p", kind="pivot")
    sink_step(saga, "r", kind="retriable", retry=Retry(attempts=None, first=10.0, limit=10.0))
    return saga


def test_saga_goes_forward_only_when_its_pivot_is_done(rig: Rig) -> None:
    rig.sink.fate["r"] = POISON
    saga = rig.start(pivoted(), {})
    rig.settle()
    assert rig.state(saga) == "completing"
    rig.cancel(saga)
    rig.settle()
    assert rig.state(saga) == "completing"
    notes = rig.admin.execute("select what, detail from outbox.saga_event where saga = %s order by id", (saga,))
    assert ("refused", "the pivot is done: a saga goes forward from there") in notes.fetchall()
    for _ in range(3):
        rig.later(60)
        rig.settle()
    rig.sink.fate.clear()
    rig.later(60)
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.done() == ["a", "p", "r"]


def test_saga_i7_is_undone_when_it_is_cancelled_before_the_pivot(rig: Rig) -> None:
    rig.sink.fate["p"] = RETRY
    saga = rig.start(pivoted(), {})
    rig.settle(sink=False)
    rig.sinker.step()
    rig.settle(sink=False)  # the pivot is on its way
    rig.cancel(saga)
    rig.settle(sink=False)
    assert rig.steps(saga)["p"] == "recalled"
    rig.sink.fate.clear()  # it would succeed now, and must not be tried any more
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]
    assert rig.parked() == {}


def test_saga_i7_is_completed_when_the_pivot_was_faster_than_the_cancel(rig: Rig) -> None:
    saga = rig.start(pivoted(), {})
    rig.settle(sink=False)
    for _ in range(2):  # a, then p, is applied and reported; the engine doesn't know yet
        rig.clock.step()
        rig.sinker.step()
        if rig.done() == ["a"]:
            rig.settle(sink=False)
    assert rig.done() == ["a", "p"]
    rig.admin.execute("select 1")
    rig.cancel(saga)
    rig.settle()
    assert rig.state(saga) == "completed"


def test_saga_parked_intent_is_withdrawn_when_its_step_times_out(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("slow", dict)
    sink_step(saga, "a")
    sink_step(saga, "b", timeout=30.0)
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["b"] = RETRY._replace(untouched=True)
    started = rig.start(saga, {})
    rig.settle()
    assert rig.parked() == {"retry": ["b"]}
    rig.later(31)
    rig.sink.fate.clear()  # it would succeed now, and must not be tried any more
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.parked() == {}
    assert rig.done() == ["a", "undo a"]
    assert "timed out" in rig.reason(started)


def test_saga_i7_late_success_is_undone_when_the_timeout_came_first(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("late", dict)
    sink_step(saga, "a", timeout=30.0)
    started = rig.start(saga, {})
    rig.settle(sink=False)
    rig.clock.step()
    assert rig.sinker.step()  # applied, and the report is in the log
    rig.later(31)
    rig.engine.participant.wake()  # type: ignore[attr-defined]
    # The timer is older than the report for the engine.
    rig.settle()
    assert rig.done() in (["a"], ["a", "undo a"])
    assert (rig.state(started), rig.done()) in [("completed", ["a"]), ("compensated", ["a", "undo a"])]


@pytest.mark.parametrize(("decision", "state"), [("skip", "compensated"), ("retry", "completed")])
def test_saga_is_told_when_an_operator_decides_about_its_parked_intent(rig: Rig, decision: str, state: str) -> None:
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["c"] = RETRY
    saga = rig.start(three(), {})
    rig.settle()
    assert rig.parked() == {"retry": ["c"]}
    rig.sink.fate.clear()
    rig.admin.execute("select outbox.decide(%s, array(select id from outbox.parked))", (decision,))
    rig.settle()
    assert rig.state(saga) == state


# ------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("bad", [False, True])
def test_saga_i3_is_not_changed_by_what_the_engine_has_read_before(rig: Rig, bad: bool) -> None:
    """Reports may come twice: a participant that was ahead of its lane reports again what it holds."""
    if bad:
        rig.sink.fate["c"] = POISON
    saga = rig.start(three(), {})
    rig.settle()
    before = (rig.state(saga), rig.steps(saga), rig.done(), rig.things())
    rig.admin.execute(
        "insert into outbox.log (target, action, key, payload) "
        "select target, action, key, payload from outbox.log where target = 'saga' order by id"
    )
    rig.settle()
    assert (rig.state(saga), rig.steps(saga), rig.done(), rig.things()) == before
    assert rig.parked() == {}


@pytest.mark.parametrize("after", range(8))
def test_saga_i3_i7_is_not_disturbed_when_the_engine_dies_before_its_position_is_written(rig: Rig, after: int) -> None:
    rig.sink.fate["c"] = POISON
    saga = rig.start(three(), {})
    for n in range(60):
        rig.clock.step()
        if n == after:
            advance = rig.engine._advance

            def die(*_: Any) -> None:
                raise KeyboardInterrupt

            rig.engine._advance = die  # type: ignore[method-assign, assignment]
            try:
                rig.engine.step()
            except KeyboardInterrupt:
                rig.kill_engine()
            else:
                rig.engine._advance = advance  # type: ignore[method-assign]
        else:
            rig.engine.step()
        rig.sinker.step()
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]
    assert rig.things() == {}


# --------------------------------------------------------------------------------------------------------- blobs


@pytest.mark.parametrize("good", [True, False])
def test_saga_publishes_staged_bytes_or_leaves_them_to_the_sweeper(rig: Rig, tmp_path: Path, good: bool) -> None:
    from outbox.blob import BlobStore
    from workers.blob import BlobParticipant
    from workers.sweeper import sweep

    store = BlobStore(tmp_path / "blobs")
    rig.settings = rig.outbox._settings = replace(rig.settings, blobs=tmp_path / "blobs")
    saga: Saga[dict[str, Any]] = Saga("photo", dict)
    sink_step(saga, "before")
    photo = saga.intent(name="photo")(lambda run: run.blobs.put(run.input["staged"]))
    photo.undo(lambda run: run.blobs.delete(run.input["staged"]["digest"]))
    rig.deploy(saga)
    rig.sink.fate["before"] = APPLIED if good else POISON
    with rig.sessions.begin() as session:
        staged = rig.outbox.blobs.stage(session, b"bytes" * 100_000)
        started = saga.start(session, {"staged": staged})
    row = rig.admin.execute("select log from outbox.identity").fetchone()
    assert row is not None
    rig.clock.step()
    sweep(rig.conn, store, log=row[0], trash_age=3600)
    assert len(list(store.stages())) == 1, "it is needed: the saga has not ended"
    lane = lanes.claim(rig.conn, "blob", 0, owner=uuid4(), ttl=600)
    assert lane is not None
    blobs = rig.reader(lane, BlobParticipant(store))  # type: ignore[arg-type]
    for _ in range(20):
        rig.settle()
        blobs.step()
    assert rig.state(started) == ("completed" if good else "compensated")
    assert store.exists(staged["digest"]) == good
    sweep(rig.conn, store, log=row[0], trash_age=3600)
    assert list(store.stages()) == []
