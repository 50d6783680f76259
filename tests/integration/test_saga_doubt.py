"""What an operator says of a saga's intent that is in doubt, and the last line of defence of its rows."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from outbox import Saga, cli
from outbox import lane as lanes
from outbox.errors import Fenced
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.saga import report, store
from tests.fixtures.sagas import Rig, sink_step
from workers.postgres import Postgres

DOUBT = Outcome(Verdict.IN_DOUBT, error="nobody knows")
AGAIN = Outcome(Verdict.RETRY, error="not now")


def pair() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("pair", dict)
    sink_step(saga, "a")
    sink_step(saga, "b")
    return saga


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


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("word", ["--done", "--not-done"])
def test_saga_resolve_decides_about_the_parked_intent_too_and_is_audited_once(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch, word: str, cancelled: bool
) -> None:
    # Given: nobody knows whether b has happened
    rig.sink.fate["b"] = DOUBT
    saga = rig.start(pair(), {})
    rig.settle()
    rig.sink.fate.clear()
    if cancelled:
        rig.cancel(saga)
        rig.settle()
    # When: an operator says how it was, of the step
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    assert cli.main(["saga", "resolve", str(saga), "b", word, "--note", "looked"]) == 0
    # Then: that is so for the parked intent at once
    assert "in_doubt" not in rig.parked()
    rig.settle()
    assert rig.parked() == {}
    assert rig.state(saga) == ("compensated" if cancelled else "completed")
    done = ["a"] if word == "--done" else ["a", "b"]
    if cancelled:
        done = ["a", "undo b", "undo a"] if word == "--done" else ["a", "undo a"]
    assert rig.done() == done
    # … and it is on record once, with who and why, for the intent and for the saga.
    action = "applied" if word == "--done" else "not_applied"
    assert rig.admin.execute("select action, who, note from outbox.audit").fetchall() == [
        (action, "outbox_operator", "looked")
    ]
    events = rig.admin.execute("select step, what, detail, who from outbox.saga_event where who <> ''").fetchall()
    mine = [event for event in events if event[1] != "cancel"]
    assert mine == [("b", f"parked: {action.replace('_', ' ')}", "looked", "outbox_operator")]


def parked_retry(rig: Rig, saga: Saga[dict[str, Any]], fate: Outcome = AGAIN) -> Any:
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["b"] = fate
    started = rig.start(saga, {})
    rig.settle()
    return started


def ask(rig: Rig, saga: Any, *words: str, status: int = 0) -> None:
    assert cli.main(["saga", words[0], str(saga), *words[1:]]) == status


def test_saga_retry_tries_the_parked_intent_of_a_step_at_once(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saga = parked_retry(rig, pair())
    assert rig.parked() == {"retry": ["b"]}
    rig.sink.fate.clear()
    rig.settle()
    assert rig.done() == ["a"], "it is due in an hour"
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    ask(rig, saga, "retry", "b")
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.done() == ["a", "b"]
    assert rig.admin.execute("select action from outbox.audit").fetchall() == [("retry",)]


@pytest.mark.parametrize("after", [False, True])
def test_saga_skip_leaves_the_parked_intent_of_a_step_out(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    saga: Saga[dict[str, Any]] = Saga("skip", dict)
    sink_step(saga, "a", kind="pivot" if after else "compensatable")
    sink_step(saga, "b", kind="retriable" if after else "compensatable")
    started = parked_retry(rig, saga)
    rig.sink.fate.clear()
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    ask(rig, started, "skip", "b")
    rig.settle()
    # Before the pivot that is a failure, after it the step is left out, and not begun anew.
    assert rig.state(started) == ("completed" if after else "compensated")
    assert rig.steps(started)["b"] == ("skipped" if after else "undone")
    assert rig.done() == (["a"] if after else ["a", "undo b", "undo a"])
    assert rig.parked() == {"skipped": ["b"]}


def test_saga_request_is_refused_at_once_when_the_parked_intent_can_not_be_decided_about_so(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.sink.fate["b"] = DOUBT
    saga = rig.start(pair(), {})
    rig.settle()
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    for word in ("retry", "skip"):
        ask(rig, saga, word, "b", status=1)
        assert "its effect may have happened: resolve it" in capsys.readouterr().err
    assert rig.parked() == {"in_doubt": ["b"]}
    assert rig.admin.execute("select count(*) from outbox.audit").fetchone() == (0,)


def test_saga_outcome_is_told_by_the_owner_of_its_lane_alone(rig: Rig) -> None:
    """A worker of one participant can't say what became of another one's intent."""
    rig.admin.execute("select outbox.register('other')")
    saga = rig.start(pair(), {})
    rig.settle(sink=False)
    number = rig.admin.execute("select intent from outbox.saga_step where intent is not null").fetchone()
    assert number is not None
    mine = rig.sinker.lane
    other = lanes.claim(rig.conn, "other", 0, owner=uuid4(), ttl=600)
    assert other is not None
    reports = [report.Report(number[0], "applied")]
    report.send(rig.conn, other, reports)
    with pytest.raises(Fenced):
        report.send(rig.conn, dataclasses.replace(mine, epoch=mine.epoch - 1), reports)
    rig.settle(sink=False)
    assert rig.steps(saga)["a"] == "running", "nobody who knows has said anything"
    report.send(rig.conn, mine, reports)
    rig.settle(sink=False)
    assert rig.steps(saga)["a"] == "done"


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
