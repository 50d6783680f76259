"""What the engine asks for costs the same however many finished sagas are kept: pages are counted, not time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import outbox.sql
from outbox import Saga, sql
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.sql.array import array
from tests.fixtures.sagas import Rig, sink_step

FEW, MANY = 500, 20_000

DEEPER = 12
"""Pages that a statement about two sagas may read more, because indexes are deeper: a scan reads hundreds more."""

#: Asked by people and by commands, about all sagas.
PEOPLE = {
    "saga_ask", "saga_find", "saga_find_stuck", "saga_open", "saga_open_input", "saga_plan_put", "saga_show",
    "saga_show_events", "saga_show_steps",
}  # fmt: skip

# As the engine leaves them behind, but for the checks of foreign keys, which would only take their time.
FILL = (
    """insert into outbox.saga (id, name, version, shape, key, state, decision, input, started_at, ended_at)
       select id, 'three', 1, '0123456789abcdef', 'kept/' || n, 'completed', 'commit', '{"a": 1}',
              now() - n * interval '1 second', now() - n * interval '1 second' from kept""",
    """insert into outbox.saga_step (saga, step, place, state, round, intent, began_at, ended_at)
       select id, step, place, 'done', 1, n, now(), now()
         from kept, unnest(array['one', 'two', 'three']) with ordinality as t (step, place)""",
    "insert into outbox.saga_event (saga, what) select id, 'late success' from kept",
    "insert into outbox.saga_void (id, answered) select 1000000000 + n, true from kept",
    "insert into outbox.log (target, action, key, payload, saga) select 'sink', 'put', n::text, '{}', id from kept",
)


def fill(rig: Rig, first: int, last: int) -> None:
    with rig.admin.transaction():
        rig.admin.execute("set local session_replication_role = replica")
        rig.admin.execute(
            "create temporary table kept on commit drop as "
            "select n, md5(n::text)::uuid as id from generate_series(%s::int, %s::int) as n",
            (first, last),
        )
        for statement in FILL:
            rig.admin.execute(statement)
    for table in ("saga", "saga_step", "saga_event", "saga_void", "saga_timer", "saga_lock", "saga_early", "log"):
        rig.admin.execute(f"vacuum (analyze) outbox.{table}")


def parameters(rig: Rig, sagas: list[UUID], intents: list[int]) -> dict[str, dict[str, Any]]:
    """Statement → what the engine, or a worker, would give it for these two sagas."""
    ids = [str(saga) for saga in sagas]
    two = len(ids)
    lane = rig.engine.lane
    me = {"target": lane.target, "lane": lane.lane, "epoch": lane.epoch}
    sink = rig.sinker.lane
    share = {"target": sink.target, "slot_low": sink.slots.low, "slot_high": sink.slots.high}
    common = {
        "id": array(ids), "state": array(["running"] * two), "decision": array(["open"] * two),
        "signals": array(["[]"] * two), "reason": array([""] * two), "ended": array([False] * two),
    }  # fmt: skip
    new = [str(UUID(int=n)) for n in range(two)]
    steps = {"saga": array(ids), "step": array(["a"] * two)}
    return {
        "saga_blocked": share,
        "saga_early": {"ids": sagas},
        "saga_early_drop": {"ids": sagas},
        "saga_early_expire": {"seconds": 86400.0, "limit": 1000},
        "saga_early_put": {
            "id": array(intents), "saga": array(ids), "action": array(["signal"] * two), "payload": array(["{}"] * two),
        },
        "saga_event_put": {**steps, "what": array(["w"] * two), "detail": array([""] * two), "who": array([""] * two)},
        "saga_hurry": share,
        "saga_insert": {
            **common, "id": array(new), "name": array(["n"] * two), "version": array([1] * two),
            "shape": array(["s"] * two), "key": array([None] * two), "input": array(["{}"] * two),
            "parent": array([None] * two), "parent_intent": array([None] * two),
        },
        "saga_keep": {"ids": intents},
        "saga_load": {"ids": sagas},
        "saga_load_steps": {"ids": sagas},
        "saga_lock_ask": {"saga": sagas[0], "names": ["new"]},
        "saga_lock_cycle": {"saga": sagas[1]},
        "saga_lock_drop": {"ids": sagas},
        "saga_lock_grant": {"names": ["x"]},
        "saga_lock_hold": {"saga": sagas[1]},
        "saga_recall": {"ids": intents},
        "saga_report": {
            **me, "target": sink.target, "epoch": sink.epoch, "ids": intents, "verdicts": ["failed"] * two,
            "errors": [""] * two,
        },
        "saga_step_put": {
            **steps, "place": array([0] * two), "state": array(["done"] * two), "round": array([1] * two),
            "tries": array([0] * two), "intent": array(intents), "result": array([None] * two),
            "error": array([""] * two),
        },
        "saga_timer_drop": steps,
        "saga_timer_set": {
            **steps, "what": array(["timeout"] * two), "round": array([1] * two), "tries": array([0] * two),
            "seconds": array([1.0] * two),
        },
        "saga_tried": {"ids": intents},
        "saga_update": {**common, "revision": array([1] * two)},
        "saga_void": {"ids": intents},
        "saga_wake": {**me, "limit": 1000},
    }  # fmt: skip


def pages(rig: Rig, name: str, given: dict[str, Any]) -> int:
    """Pages that a statement reads. What it writes is rolled back."""
    with rig.admin.transaction(force_rollback=True):
        row = rig.admin.execute("explain (analyze, buffers, format json) " + sql.load(name), given).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.fixture
def open_sagas(rig: Rig) -> tuple[list[UUID], list[int]]:
    """Two sagas that go on, with a timer, one of which waits for the other's lock, and their intents."""
    saga: Saga[dict[str, Any]] = Saga("open", dict, locks=lambda _value: ["x"], lock_timeout=1e6)
    sink_step(saga, "a", timeout=1e6)
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["a"] = Outcome(Verdict.RETRY, error="not now")
    sagas = [rig.start(saga, {}) for _ in range(2)]
    rig.settle()
    assert [rig.state(one) for one in sagas] == ["running", "waiting"]
    row = rig.admin.execute("select intent from outbox.saga_step where intent is not null").fetchone()
    assert row is not None
    return sagas, [row[0], row[0] + 1]


def test_saga_statements_read_no_more_pages_when_many_finished_sagas_are_kept(
    rig: Rig, open_sagas: tuple[list[UUID], list[int]]
) -> None:
    # Given
    given = parameters(rig, *open_sagas)
    fill(rig, 1, FEW)
    few = {name: pages(rig, name, values) for name, values in given.items()}
    # When
    fill(rig, FEW + 1, MANY)
    many = {name: pages(rig, name, values) for name, values in given.items()}
    # Then
    grown = {name: (few[name], many[name]) for name in given if many[name] > few[name] + DEEPER}
    assert not grown, f"pages with {FEW} and {MANY} kept: {json.dumps(grown)}"


def test_saga_statements_are_all_looked_at(rig: Rig, open_sagas: tuple[list[UUID], list[int]]) -> None:
    there = {path.stem for path in Path(outbox.sql.__path__[0]).glob("saga_*.sql")}
    assert there == PEOPLE | set(parameters(rig, *open_sagas))
