"""Functions of an application that do what they shouldn't: their saga bears it, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Saga
from outbox.errors import Permanent
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step

ONCE = Retry(attempts=1)


def innocent() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("innocent", dict)
    function_step(saga, "fine")
    return saga


def commits(session: Session) -> None:
    session.execute(sa.text("insert into thing values ('half', 1)"))
    session.commit()
    raise ValueError("after its commit")


def commits_by_block(session: Session) -> None:
    with session.begin():
        session.execute(sa.text("insert into thing values ('half', 1)"))
    raise ValueError("after its commit")


def says_nul(_session: Session) -> None:
    raise Permanent("the name \x00 is not one")


def says_surrogate(_session: Session) -> None:
    raise Permanent("the name \udcff is not one")


def returns_nul(_session: Session) -> str:
    return "\x00"


def returns_much(_session: Session) -> list[str]:
    return ["x" * 100] * 1000


def returns_numbers(_session: Session) -> list[float]:
    return [1e300] * 300  # 2 KB in Python, and 90 KB as Postgres prints it


def returns_no_json(_session: Session) -> object:
    return object()


def swallows(session: Session) -> None:
    try:
        session.execute(sa.text("select 1 / 0"))
    except sa.exc.DBAPIError:
        return


@pytest.mark.parametrize(
    "unruly",
    [commits, commits_by_block, says_nul, says_surrogate, returns_nul, returns_much, returns_numbers,
     returns_no_json, swallows],
)  # fmt: skip
def test_saga_function_fails_alone_and_leaves_nothing_when_it_is_unruly(
    rig: Rig, unruly: Callable[[Session], Any]
) -> None:
    saga: Saga[dict[str, Any]] = Saga("unruly", dict)

    @saga.function(retry=ONCE)
    def step(session: Session, _run: Any) -> Any:
        return unruly(session)

    step.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    other = rig.start(innocent(), {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.state(other) == "completed"
    assert rig.things() == {"fine": 1}
    assert rig.reason(started).startswith("step 'step' failed: ")


def test_saga_function_is_told_that_it_may_not_commit(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("commits", dict)

    @saga.function
    def step(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into thing values ('half', 1)"))
        with session.begin_nested():
            session.execute(sa.text("insert into thing values ('nested', 1)"))
        session.commit()

    step.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    rig.settle()
    assert "may not commit" in rig.reason(started)
    assert rig.things() == {}


def test_saga_function_may_use_savepoints_and_roll_back(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("rolls-back", dict)

    @saga.function
    def step(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into thing values ('gone', 1)"))
        session.rollback()
        with session.begin_nested():
            session.execute(sa.text("insert into thing values ('kept', 1)"))

    step.undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "completed"
    assert rig.things() == {"kept": 1}


@pytest.mark.parametrize("names", [[""], ["x" * 600], ["a\x00b"], ["\udcff"], [7], "text", None], ids=repr)
def test_saga_with_locks_that_are_no_names_ends_alone(rig: Rig, names: Any) -> None:
    saga: Saga[dict[str, Any]] = Saga("locks", dict, locks=lambda _input: names)
    function_step(saga, "f")
    started = rig.start(saga, {})
    other = rig.start(innocent(), {})
    rig.settle()
    assert rig.state(other) == "completed"
    assert rig.state(started) == "compensated"
    assert "locks" in rig.reason(started)


def test_saga_i7_goes_back_when_its_intent_is_for_nobody(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("nobody", dict)
    function_step(saga, "f")
    step = saga.intent(name="typo")(lambda run: run.emit("indx", "put", "k"))
    step.undo(lambda run: run.emit("indx", "delete", "k"))
    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert "there is no participant 'indx'" in rig.reason(started)


@pytest.mark.parametrize("payload", [{"numbers": [1e300] * 300}, {"small": [1e-300] * 300}], ids=["large", "small"])
def test_saga_i7_goes_back_alone_when_the_numbers_of_its_intent_are_longer_than_they_look(
    rig: Rig, payload: Any
) -> None:
    saga: Saga[dict[str, Any]] = Saga("numbers", dict)
    function_step(saga, "f")
    saga.intent(name="n", kind="pivot")(lambda run: run.emit("sink", "put", "k", payload))
    started = rig.start(saga, {})
    other = rig.start(innocent(), {})
    rig.settle()
    assert (rig.state(started), rig.state(other)) == ("compensated", "completed")
    assert "the limit is 65,536" in rig.reason(started)
    assert rig.things() == {"fine": 1}


def test_saga_i7_goes_back_alone_when_the_input_of_its_child_is_too_large(rig: Rig) -> None:
    child: Saga[dict[str, Any]] = Saga("child", dict)
    function_step(child, "c")
    saga: Saga[dict[str, Any]] = Saga("parent", dict)
    function_step(saga, "f")
    sub = saga.child(child, name="sub")(lambda _run: {"text": "x" * 65_500})
    sub.undo(lambda _session, _run: None)
    rig.deploy(child)
    started = rig.start(saga, {})
    other = rig.start(innocent(), {})
    rig.settle()
    assert (rig.state(started), rig.state(other)) == ("compensated", "completed")
    assert "step 'sub' failed: the payload is" in rig.reason(started)
    assert rig.parked() == {}
