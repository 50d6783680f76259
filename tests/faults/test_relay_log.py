"""A relayed queue, and what becomes of its log: behind a pooler, adopted, and with old parts of it dropped."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from outbox import era, retention
from tests.faults.test_relay import Order, _came_true, _saga, _send
from tests.fixtures.brokers import RedisServer
from tests.fixtures.farside import BROKER, FarSide
from tests.fixtures.pgbouncer import PgBouncer
from tests.fixtures.retention import AGE, SIZE, drop_all, grow_old
from tests.fixtures.site import LIMIT, until
from tests.integration.test_actor_history import adopt
from workers import clock

ENDED = "select count(*) from outbox.saga where id = any(%s) and state = 'completed'"


def test_relay_faults_i2_i3_i7_everything_comes_true_behind_pgbouncer_when_the_relay_is_killed(
    redis_server: RedisServer, farside: FarSide, pgbouncer: PgBouncer, database: str
) -> None:
    # Given a relay and a far worker behind PgBouncer, with messages and steps of sagas
    stage, saga = farside.stage, _saga(farside)
    pooled = {"OUTBOX_DATABASE": pgbouncer.url("outbox_worker", database)}
    farside.far(redis_server.url, pgbouncer.url("app", database))
    with stage.engine(saga):
        names = _send(farside, *(f"note {n}" for n in range(50)))
        with stage.company.sessions.begin() as session:
            started = [saga.start(session, Order(f"step {n}")) for n in range(10)]
        names |= {f"step {n}" for n in range(10)}
        # When the relay is killed in the middle, and more is sent
        killed = farside.relay(redis_server.url, **pooled)
        until(farside.far_runs, "it relays")
        killed.kill()
        killed.wait(LIMIT)
        names |= _send(farside, *(f"later {n}" for n in range(50)))
        relay = farside.relay(redis_server.url, **pooled)
        # Then the next one brings everything to its end, and ends when it is told to
        until(lambda: stage.one(ENDED, started) == len(started), "the sagas are completed")
    _came_true(farside, names)
    relay.terminate()
    _, said = relay.communicate(timeout=LIMIT)
    assert (relay.returncode, "prepared statement" in said, "Traceback" in said) == (0, False, False)


def test_relay_faults_i2_i3_i7_queue_stops_with_its_log_and_goes_on_when_that_is_adopted(
    redis_server: RedisServer, farside: FarSide
) -> None:
    # Given a relayed queue that has handed on a message, and a step that nobody has run; and has more to hand on
    stage, saga = farside.stage, _saga(farside)
    names = _send(farside, "before") | {"step", "open", "after"}
    with stage.company.sessions.begin() as session:
        started = [saga.start(session, Order("step"))]
    with stage.engine(saga):
        until(lambda: stage.one("select count(*) from outbox.log where target = %s", farside.target) == 2, "both sent")
    farside.relay_once(redis_server.url)
    assert redis_server.count(farside.queue) == 2
    _send(farside, "open")
    # When the log can't go on
    era.halt(stage.admin, "for the test")
    farside.relay(redis_server.url)
    stopped = "select min(reason) from outbox.lane where target = %s and state = 'stopped'"
    # Then the queue is stopped, and says why, and nothing is handed on
    assert "for the test" in until(lambda: stage.one(stopped, farside.target), "the queue is stopped")
    assert redis_server.count(farside.queue) == 2
    # When it is adopted
    adopted = adopt(stage)
    assert adopted.in_doubt == 0
    _send(farside, "after")
    farside.far(redis_server.url, BROKER)
    # Then the same relay goes on in the next era, once with each, and hears of the step of before
    with stage.engine(saga):
        until(lambda: stage.one(ENDED, started) == 1, "the saga is completed")
    _came_true(farside, names)
    assert len(farside.far_runs()) == len(names)


def test_relay_faults_i2_i7_retention_keeps_what_is_to_be_handed_on_or_heard_of(
    redis_server: RedisServer, farside: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a step that was handed on, and not heard of, and a message that is to be handed on; long ago
    stage, saga = farside.stage, _saga(farside)
    with stage.company.sessions.begin() as session:
        started = [saga.start(session, Order("step"))]
    with stage.engine(saga):
        until(lambda: stage.one("select count(*) from outbox.log where target = %s", farside.target), "it is sent")
        farside.relay_once(redis_server.url)
    _send(farside, "late")
    stage.admin.execute("select setval('outbox.log_id', %s)", (SIZE - 1,))

    def shown() -> bool:
        stage.admin.execute("select nextval('outbox.log_id')")
        return bool(stage.one("select outbox.cut(%s) is not null", SIZE))

    until(shown, "a tick shows the whole partition")
    # The clock would thin them, with those where somebody just is.
    monkeypatch.setattr(clock, "TICK_AGE", "100 years")
    grow_old(stage.admin)
    with psycopg.connect(stage.urls["outbox_worker"], autocommit=True) as conn:

        def held() -> set[str]:
            plan = retention.plan(conn, AGE)
            assert bool(plan.holds) is not bool(plan.ready)
            return {f"{hold.kind} {hold.name.partition('/')[0]}" for hold in plan.holds}

        # Then both hold that part of the log
        assert held() == {f"lane {farside.target}", f"saga {started[0]}"}
        # ... and as soon as the message is handed on, only the step does
        farside.relay_once(redis_server.url)
        assert held() == {f"saga {started[0]}"}
        # When the far side has told of it, and the saga has ended
        farside.far(redis_server.url, BROKER)
        farside.relay(redis_server.url)
        with stage.engine(saga):
            until(lambda: stage.one(ENDED, started) == 1, "the saga is completed")
        until(lambda: held() == set(), "nobody holds it")
        # Then it is dropped, and the relay goes on
        assert [each.name for each in drop_all(conn, tmp_path)] == ["log_000000"]
    _send(farside, "after")
    _came_true(farside, {"step", "late", "after"})
    assert len(farside.far_runs()) == 3
