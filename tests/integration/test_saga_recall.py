"""What is under way when a saga goes back, and what an operator says of it: the saga always gets an answer."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest

from outbox import Saga, cli
from outbox.errors import Fenced
from outbox.participant import Outcome, Verdict
from outbox.saga import store
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step, sink_step
from workers.postgres import Postgres

DOUBT = Outcome(Verdict.IN_DOUBT, error="nobody knows")


def pair() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("pair", dict)
    sink_step(saga, "a")
    sink_step(saga, "b")
    return saga


# ----------------------------------------------------------------------------------------- nothing is in flight


@pytest.mark.parametrize("kind", ["intent", "child"])
def test_saga_i7_is_undone_when_it_is_cancelled_while_no_intent_could_be_made_yet(rig: Rig, kind: str) -> None:
    # Given: a step whose function fails for now, so that nothing of it is in the log
    saga: Saga[dict[str, Any]] = Saga("unmade", dict)
    sink_step(saga, "a")

    def unmade(_run: Any) -> Any:
        raise ValueError("later")

    retry = Retry(attempts=5, first=1000.0, limit=1000.0)
    if kind == "intent":
        saga.intent(name="b", retry=retry)(unmade).undo(unmade)
    else:
        kid: Saga[dict[str, Any]] = Saga("kid", dict)
        function_step(kid, "k")
        rig.deploy(kid)
        saga.child(kid, name="b", retry=retry)(unmade).undo(lambda _session, _run: None)
    started = rig.start(saga, {})
    rig.settle()
    assert rig.steps(started) == {"a": "done", "b": "running"}
    # When: it is cancelled
    rig.cancel(started)
    rig.settle()
    # Then: nobody waits for an answer that nobody gives
    assert rig.state(started) == "compensated"
    assert rig.done() == ["a", "undo a"]


# ------------------------------------------------------------------------------------- applied, and not recorded


class Died(BaseException):
    """The sink's worker was killed."""


def test_saga_i7_is_undone_when_a_step_was_applied_and_its_worker_died_and_it_was_recalled(rig: Rig) -> None:
    # Given: a participant that keeps its own position has applied b, and its worker has died before it could say so
    rig.sink.keeps_position = True
    saga = rig.start(pair(), {})
    for _ in range(50):
        rig.clock.step()
        rig.engine.step()
        if rig.steps(saga).get("b") == "running":
            break
        rig.sinker.step()

    def die(*_: Any) -> None:
        raise Died

    rig.sinker._record = die  # type: ignore[method-assign, assignment]
    rig.clock.step()
    with pytest.raises(Died):
        for _ in range(50):
            rig.sinker.step()
    assert rig.done() == ["a", "b"]
    rig.kill_sink()
    # When: the saga is cancelled meanwhile
    rig.cancel(saga)
    rig.settle(sink=False)
    assert rig.steps(saga)["b"] == "recalled"
    # Then: the next worker tells what it holds, and it is undone
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "b", "undo b", "undo a"]


# ------------------------------------------------------------------------------------------------------ in doubt


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("word", ["--applied", "--not-applied"])
def test_saga_i7_hears_what_an_operator_says_of_its_intent_that_is_in_doubt(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch, word: str, cancelled: bool
) -> None:
    # Given: nobody knows whether b has happened
    rig.sink.fate["b"] = DOUBT
    saga = rig.start(pair(), {})
    rig.settle()
    assert rig.parked() == {"in_doubt": ["b"]}
    assert rig.state(saga) == "running"
    rig.sink.fate.clear()
    if cancelled:
        rig.cancel(saga)
        rig.settle()
        assert rig.state(saga) == "compensating", "b may have happened: it waits"
    # When: an operator has found out
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    row = rig.admin.execute("select id from outbox.parked").fetchone()
    assert row is not None
    assert cli.main(["parked", "resolve", word, str(row[0]), "--yes"]) == 0
    rig.engine.decided()
    rig.settle()
    # Then: the saga goes on from there
    assert rig.state(saga) == ("compensated" if cancelled else "completed")
    done = ["a"] if word == "--applied" else ["a", "b"]
    if cancelled:
        done = ["a", "undo b", "undo a"] if word == "--applied" else ["a", "undo a"]
    assert rig.done() == done
    assert rig.parked() == {}


# ----------------------------------------------------------------------------------------------- two of an engine


def test_saga_i6_is_not_written_over_when_another_has_changed_it(rig: Rig, server: Postgres, database: str) -> None:
    """The last line of defence: behind the lane's epoch, which each transaction of the engine holds."""
    saga: Saga[dict[str, Any]] = Saga("waits", dict)
    saga.signal("go", timeout=1000.0)
    sink_step(saga, "a")
    started = rig.start(saga, {})
    rig.settle()
    with psycopg.connect(server.url("saga", database), autocommit=True) as conn:
        first, second = (store.load(conn, [started, uuid4()], rig.definitions)[started] for _ in range(2))
        for one in (first, second):
            assert isinstance(one, store.Record)
            one.touched = True
        assert isinstance(first, store.Record)
        assert isinstance(second, store.Record)
        store.save(conn, [first])
        with pytest.raises(Fenced, match="another engine has changed"):
            store.save(conn, [second])
