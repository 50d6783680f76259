"""Sagas of one batch share a transaction, a session that nobody has touched, and statements: and nothing else."""

from __future__ import annotations

from typing import Any
from uuid import RFC_4122

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Saga
from outbox.errors import Permanent
from tests.fixtures.sagas import Rig, function_step, sink_step


def test_saga_i1_keeps_nothing_of_a_failed_step_when_the_one_before_left_its_session_alone(rig: Rig) -> None:
    # Given a step that doesn't touch its session, so that the next one may get it, which writes, emits and fails
    saga: Saga[dict[str, Any]] = Saga("shared", dict)
    given: list[Session] = []

    @saga.function
    def idle(session: Session, _run: Any) -> None:
        given.append(session)

    @idle.undo
    def undo_idle(_session: Session, _run: Any) -> None:
        """Nothing was done."""

    @saga.function(kind="pivot")
    def writes(session: Session, _run: Any) -> None:
        given.append(session)
        session.execute(sa.text("insert into thing values ('ghost', 1)"))
        rig.outbox.emit(session, "sink", "put", "ghost", "ghost")
        raise Permanent("no")

    good: Saga[dict[str, Any]] = Saga("good", dict)
    function_step(good, "b")
    # When it runs, and another saga in the same batch after it
    bad = rig.start(saga, {})
    fine = rig.start(good, {})
    rig.settle()
    # Then the session was shared, and of the failed step nothing is left, nor in the next one's way
    assert given[0] is given[1]
    assert (rig.state(bad), rig.state(fine)) == ("compensated", "completed")
    assert rig.things() == {"b": 1}
    assert rig.done() == []


def test_saga_i1_gives_each_step_a_session_of_its_own_when_it_was_used(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("own", dict)
    given: list[tuple[Session, int]] = []

    def writes(session: Session, run: Any) -> None:
        given.append((session, len(session.identity_map) + len(session.info.get("mine", ()))))
        session.info["mine"] = ["something"]
        session.execute(sa.text("insert into thing values (:name, 1)"), {"name": f"n{len(given)}"})

    for name in ("a", "b"):

        @saga.function(name=name)(writes).undo
        def undo(_session: Session, _run: Any) -> None:
            """Not asked for."""

    number = rig.start(saga, {})
    rig.settle()
    assert rig.state(number) == "completed"
    assert given[0][0] is not given[1][0]
    assert [left for _, left in given] == [0, 0]
    assert rig.things() == {"n1": 1, "n2": 1}


@pytest.mark.parametrize("text", ['"', "\\", "{a,b}", "null", 'it said "no\\"'])
def test_saga_i2_keeps_results_inputs_and_errors_as_they_are_when_they_look_like_syntax(rig: Rig, text: str) -> None:
    saga: Saga[dict[str, Any]] = Saga("odd", dict)
    seen: list[Any] = []

    @saga.function
    def makes(_session: Session, run: Any) -> dict[str, str]:
        return {"text": run.input["text"]}

    @makes.undo
    def undo_makes(_session: Session, run: Any) -> None:
        seen.append((run.input, run.results["makes"]))

    sink_step(saga, "a")

    @saga.function(kind="pivot")
    def fails(_session: Session, _run: Any) -> None:
        raise Permanent(text)

    number = rig.start(saga, {"text": text}, key=text)
    rig.settle()
    assert rig.state(number) == "compensated"
    assert seen == [({"text": text}, {"text": text})]
    assert rig.reason(number).endswith(text)
    assert rig.admin.execute("select key from outbox.saga where id = %s", (number,)).fetchone() == (text,)


def test_saga_ids_begin_with_the_time_when_there_is_no_key(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a clock, so that this one's steps don't matter
    saga: Saga[dict[str, Any]] = Saga("timed", dict)
    function_step(saga, "a")
    with monkeypatch.context() as patch, rig.sessions() as session:
        ids = []
        for millisecond in (1_000, 1_001, 2_000):
            patch.setattr("outbox.saga.definition.time.time_ns", lambda now=millisecond: now * 1_000_000)
            ids += [saga.start(session, {}) for _ in range(50)]
    # Then the ids come in its order, so that new ones lie beside each other, and what is random of them differs
    assert [number.int >> 80 for number in ids] == [1_000] * 50 + [1_001] * 50 + [2_000] * 50
    assert len(set(ids)) == 150
    assert {(number.version, number.variant) for number in ids} == {(7, RFC_4122)}
