"""What an operator says of a saga's intent that is in doubt, and the last line of defence of its rows."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest

from outbox import Saga, cli
from outbox.errors import Fenced
from outbox.participant import Outcome, Verdict
from outbox.saga import store
from tests.fixtures.sagas import Rig, sink_step
from workers.postgres import Postgres

DOUBT = Outcome(Verdict.IN_DOUBT, error="nobody knows")


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
