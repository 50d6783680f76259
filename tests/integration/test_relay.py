"""Queues that are relayed to Redis, and workers of dramatiq there; `tests/faults/test_relay.py` has RabbitMQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Retry, Saga, whereabouts
from outbox.saga.run import Action, Run
from tests.fixtures.brokers import RedisServer
from tests.fixtures.farside import BROKER, FarSide
from tests.fixtures.site import LIMIT, until


@pytest.fixture
def broker_url(redis_server: RedisServer) -> str:
    return redis_server.url


def test_relay_i2_messages_run_at_the_far_side_with_their_own_ids(broker_url: str, farside: FarSide) -> None:
    # Given a plain worker of dramatiq at the broker, which has nothing of ours
    farside.far(broker_url)
    # When messages commit, and one is rolled back
    with farside.stage.company.sessions.begin():
        sent = [farside.note.send(f"note {n}") for n in range(20)]
    with farside.stage.company.sessions() as session, session.begin() as transaction:
        farside.note.send("ghost")
        transaction.rollback()
    farside.flaky.send("flaky")
    farside.note.send_with_options(args=("late",), delay=20)
    said = farside.relay_once(broker_url)
    # Then each runs there, under the id that it was sent with; nothing else does, and nothing is left here
    wanted = {f"note {n}" for n in range(20)}
    farside.wait_for(wanted | {"flaky", "late"})
    until(lambda: farside.far_runs().count("flaky") >= 2, "its retry ran")
    assert sorted(set(farside.far_runs())) == sorted(wanted | {"flaky", "late"})
    assert [farside.messages_of(f"note {n}") for n in range(20)] == [[one.message_id] for one in sent]
    assert farside.stage.parked() == []
    # And what it says names no address
    assert broker_url not in said
    assert "guest" not in said


@dataclass
class Order:
    name: str
    fails: bool


def _saga(farside: FarSide) -> Saga[Order]:
    saga = Saga("order", Order)

    @saga.function
    def reserve(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("insert into payment values (:name)"), {"name": run.input.name})

    @reserve.undo
    def cancel(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("delete from payment where name = :name"), {"name": run.input.name})

    @saga.intent(kind="pivot", retry=Retry(attempts=1))
    def tell(run: Run[Order]) -> Action:
        actor: Any = farside.fails if run.input.fails else farside.flaky
        return farside.broker.action(actor.message(run.input.name))

    return saga


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_relay_i7_saga_hears_when_the_far_actor_is_done_and_not_before(
    broker_url: str, farside: FarSide, fails: bool, directly: bool
) -> None:
    # Given a saga whose last step is a relayed message
    stage, saga = farside.stage, _saga(farside)
    with stage.company.sessions.begin() as session:
        started = saga.start(session, Order("x", fails))
    farside.relay(broker_url)
    with stage.engine(saga):
        # When it was handed on, and nobody works there yet
        until(lambda: stage.one("select id from outbox.relayed where verdict is null"), "it is noted")
        number = stage.one("select id from outbox.relayed")
        until(lambda: stage.one("select outbox.queue_idle(%s)", farside.target), "it was handed on")
        # Then the saga has not ended
        assert stage.one("select ended_at from outbox.saga where id = %s", started) is None
        assert "far side" in whereabouts.find(stage.admin, number).says
        # When it was run there
        farside.far(broker_url, stage.urls["app"] if directly else BROKER)
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        state = until(lambda: stage.one(ended, started), "the saga ends")
    # Then it ends as its actor did
    assert state == ("compensated" if fails else "completed")
    assert stage.payments() == ([] if fails else ["x"])
    assert (farside.far_runs(), stage.parked()) == (["x", "x"], [])
    error = stage.one("select detail from outbox.saga_event where what = 'failed'")
    assert "secret" not in (error or "")


def test_relay_i7_step_that_is_not_heard_of_is_in_doubt_and_an_operators(
    redis_server: RedisServer, farside: FarSide
) -> None:
    # Given a step that was handed on a day ago, and of which nothing was heard
    stage, saga = farside.stage, _saga(farside)
    with stage.company.sessions.begin() as session:
        started = saga.start(session, Order("x", fails=False))
    farside.relay(redis_server.url)
    with stage.engine(saga):
        until(lambda: stage.one("select outbox.queue_idle(%s)", farside.target), "the queue is read")
        number = until(lambda: stage.one("select id from outbox.relayed"), "it is handed on")
        stage.admin.execute("update outbox.relayed set relayed_at = relayed_at - interval '25 hours'")
        # When a relay looks
        farside.relay(redis_server.url)
        parked = until(stage.parked, "it is parked")
        # Then it is in doubt, and what an operator says of it counts
        assert [(reason, "far side" in error) for reason, _, error in parked] == [("in_doubt", True)]
        stage.admin.execute("select outbox.decide('applied', %s::bigint[], 'it ran', 'test')", ([number],))
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        assert until(lambda: stage.one(ended, started), "the saga ends") == "completed"
    assert stage.parked() == []


def test_relay_i2_message_that_the_far_side_gives_up_is_parked_and_retried(broker_url: str, farside: FarSide) -> None:
    # Given an actor that fails there for good
    farside.far(broker_url, BROKER)
    farside.relay(broker_url)
    sent = farside.fails.send("x")
    # When it is given up
    parked = until(farside.stage.parked, "it is parked")
    # Then an operator sees it, with no word of what it was about
    assert [(reason, attempts) for reason, attempts, _ in parked] == [("poison", 1)]
    assert "RuntimeError" in parked[0][2]
    assert "secret" not in parked[0][2]
    # And a retry hands it on once more
    number = farside.stage.one("select id from outbox.parked")
    farside.stage.admin.execute("select outbox.decide('retry', %s::bigint[], 'again', 'test')", ([number],))
    until(lambda: len(farside.far_runs()) >= 4, "it ran again, with its retry")
    assert farside.messages_of("x") == [sent.message_id]


def test_relay_i6_queue_is_worked_here_or_relayed_and_nothing_is_lost_between(
    redis_server: RedisServer, farside: FarSide
) -> None:
    stage = farside.stage
    # Given a queue that is worked here, with one message in hand
    waits = "gate"
    stage.company.waits.send("held", waits)
    farside.queue = "default"
    worker = stage.work(queues={"default"})
    until(lambda: stage.runs("held"), "it runs")
    # When it shall be relayed meanwhile
    refused = farside.relay(redis_server.url)
    _, said = refused.communicate(timeout=LIMIT)
    # Then that is refused
    assert refused.returncode == 1
    assert "is worked here" in said
    # When its worker has ended, and left something behind
    stage.open_gate(waits)
    stage.drained()
    worker.stop()
    sent = {f"note {n}" for n in range(5)}
    for name in sorted(sent):
        stage.company.note.send(name)
    assert farside.relay_once(redis_server.url)
    # Then all of it was relayed, and a worker here has none of it
    assert redis_server.count("default") == 5
    stage.work(stage.another(), queues={"default"})
    stage.company.note.send("later")
    assert farside.relay_once(redis_server.url)
    assert (redis_server.count("default"), stage.runs("later")) == (6, 0)
    # When the queue is given back
    given = farside.relay(redis_server.url, "--give-back")
    assert given.wait(LIMIT) == 0
    stage.company.note.send("here")
    # Then it is worked here
    until(lambda: stage.runs("here"), "it ran here")
    assert redis_server.count("default") == 6


def test_relay_warns_when_a_crash_of_redis_would_lose_messages(redis_server: RedisServer, farside: FarSide) -> None:
    # Given Redis as Debian configures it
    redis_server.client.config_set("appendonly", "no")
    # Then the relay says what that means; and is silent once nothing is wrong
    assert "appendfsync always" in farside.relay_once(redis_server.url)
    redis_server.client.config_set("appendonly", "yes")
    assert "appendfsync" not in farside.relay_once(redis_server.url)


def test_relay_refuses_a_password_on_the_command_line(farside: FarSide) -> None:
    # When the address on the command line has a password in it
    process = farside.relay("", "--to", "amqp://me:hush@127.0.0.1")
    _, said = process.communicate(timeout=LIMIT)
    # Then it is refused, and not repeated
    assert process.returncode == 1
    assert "OUTBOX_RELAY" in said
    assert "hush" not in said
