"""A saga of ours through the crash matrix: a real Postgres, real participants, a virtual clock; and its teeth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Retry, Saga, Settings
from outbox.participant import Participant
from outbox.testing import Broken, Mishap, Stage, crash_matrix
from tests.fixtures.lanes import TARGET, Sink
from tests.fixtures.sagas import function_step, sink_step
from workers.index import IndexParticipant
from workers.postgres import Postgres

shop: Saga[dict[str, Any]] = Saga("shop", dict)
reserved = function_step(shop, "reserve", after=())


@shop.intent(after=())
def listed(run: Any) -> Any:
    return run.index.put("lamp", title="Lamp")


@listed.undo
def unlisted(run: Any) -> Any:
    return run.index.delete("lamp")


shop.signal("approval", timeout=3600, after=[reserved, listed])
shop.delay("night", 8 * 3600)
sink_step(shop, "ship", timeout=600.0)
sink_step(shop, "pay", kind="pivot", timeout=600.0)
sink_step(shop, "thank", kind="retriable")


@pytest.fixture
def settings(server: Postgres, database: str, admin: psycopg.Connection[Any]) -> Settings:
    admin.execute("select outbox.register(%s)", (TARGET,))
    admin.execute("create table thing (name text primary key, n int); grant all on thing to app")
    return Settings(server.url("saga", database), None, None, "smtp://127.0.0.1:1")


@pytest.mark.parametrize("case", crash_matrix(shop), ids=str)
def test_crash_matrix_i3_i7_of_a_saga_with_everything(
    case: Mishap, settings: Settings, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    sink = Sink()

    def check(state: str) -> None:
        completed = state == "completed"
        assert [item.key for item in IndexParticipant(tmp_path / "index").inventory()] == (
            ["lamp"] if completed else []
        )
        assert admin.execute("select count(*) from thing").fetchone() == (int(completed),)
        held = Counter(str(payload) for _, payload in sink.effects)
        if completed:
            assert {"ship", "pay", "thank"} <= held.keys()
        else:
            assert "pay" not in held
            assert bool(held["ship"]) == bool(held["undo ship"])

    participants: dict[str, Callable[[], Participant]] = {
        "index": lambda: IndexParticipant(tmp_path / "index"),
        TARGET: lambda: sink,
    }
    ended = case(Stage(settings, {}, participants, check))
    forward = case.what in ("nothing", "fail after", "crash", "engine") or case.step == "thank"
    if case.what not in ("cancel", "time out"):
        assert ended == ("completed" if forward else "compensated")


def test_crash_matrix_has_a_case_for_everything_that_can_go_wrong() -> None:
    found = Counter(case.what for case in crash_matrix(shop))
    assert found == {
        "nothing": 1, "cancel": 7, "engine": 7, "fail before": 4, "fail after": 5, "crash": 5, "time out": 3,
    }  # fmt: skip


def test_crash_matrix_i12_finds_a_compensation_that_does_nothing(settings: Settings) -> None:
    """A saga whose undo forgets its work: the promise is broken, and the case says at which step."""
    saga: Saga[dict[str, Any]] = Saga("forgetful", dict)

    @saga.function(retry=Retry(attempts=1))
    def reserve(session: Session, _run: Any) -> None:
        session.execute(sa.text("insert into thing values ('reserve', 1)"))

    reserve.undo(lambda _session, _run: None)
    function_step(saga, "later")
    case = next(c for c in crash_matrix(saga) if (c.step, c.what) == ("later", "fail before"))

    def check(state: str) -> None:
        with psycopg.connect(settings.database) as conn:
            left = conn.execute("select count(*) from thing").fetchone()
        if state == "compensated" and left != (0,):
            raise Broken("compensated, and the reservation is still there")

    with pytest.raises(Broken, match="still there"):
        case(Stage(settings, {}, {}, check))
