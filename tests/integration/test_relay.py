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
from tests.fixtures.relays import BROKER, Relaying
from tests.fixtures.site import LIMIT, until


@pytest.fixture
def broker_url(redis_server: RedisServer) -> str:
    return redis_server.url


def test_relay_i2_messages_run_at_the_far_side_with_their_own_ids(broker_url: str, relaying: Relaying) -> None:
    # Given a plain worker of dramatiq at the broker, which has nothing of ours
    relaying.far(broker_url)
    # When messages commit, and one is rolled back
    with relaying.stage.company.sessions.begin():
        sent = [relaying.note.send(f"note {n}") for n in range(20)]
    with relaying.stage.company.sessions() as session, session.begin() as transaction:
        relaying.note.send("ghost")
        transaction.rollback()
    relaying.flaky.send("flaky")
    relaying.note.send_with_options(args=("late",), delay=20)
    said = relaying.relay_once(broker_url)
    # Then each runs there, under the id that it was sent with; nothing else does, and nothing is left here
    wanted = {f"note {n}" for n in range(20)}
    relaying.wait_for(wanted | {"flaky", "late"})
    until(lambda: relaying.far_runs().count("flaky") == 2, "its retry ran")
    assert sorted(set(relaying.far_runs())) == sorted(wanted | {"flaky", "late"})
    assert [relaying.messages_of(f"note {n}") for n in range(20)] == [[one.message_id] for one in sent]
    assert relaying.stage.parked() == []
    # And what it says names no address
    assert broker_url not in said
    assert "guest" not in said


@dataclass
class Order:
    name: str
    fails: bool


def _saga(relaying: Relaying) -> Saga[Order]:
    saga = Saga("order", Order)

    @saga.function
    def reserve(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("insert into payment values (:name)"), {"name": run.input.name})

    @reserve.undo
    def cancel(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("delete from payment where name = :name"), {"name": run.input.name})

    @saga.intent(kind="pivot", retry=Retry(attempts=1))
    def tell(run: Run[Order]) -> Action:
        actor: Any = relaying.fails if run.input.fails else relaying.flaky
        return relaying.broker.action(actor.message(run.input.name))

    return saga


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_relay_i7_saga_hears_when_the_far_actor_is_done_and_not_before(
    broker_url: str, relaying: Relaying, fails: bool, directly: bool
) -> None:
    # Given a saga whose last step is a relayed message
    stage, saga = relaying.stage, _saga(relaying)
    with stage.company.sessions.begin() as session:
        started = saga.start(session, Order("x", fails))
    relaying.relay(broker_url)
    with stage.engine(saga):
        # When it was handed on, and nobody works there yet
        until(lambda: stage.one("select id from outbox.relayed where verdict is null"), "it is noted")
        number = stage.one("select id from outbox.relayed")
        until(lambda: stage.one("select outbox.queue_idle(%s)", relaying.target), "it was handed on")
        # Then the saga has not ended
        assert stage.one("select ended_at from outbox.saga where id = %s", started) is None
        assert "far side" in whereabouts.find(stage.admin, number).says
        # When it was run there
        relaying.far(broker_url, stage.urls["app"] if directly else BROKER)
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        state = until(lambda: stage.one(ended, started), "the saga ends")
    # Then it ends as its actor did
    assert state == ("compensated" if fails else "completed")
    assert stage.payments() == ([] if fails else ["x"])
    assert (relaying.far_runs(), stage.parked()) == (["x", "x"], [])
    error = stage.one("select detail from outbox.saga_event where what = 'failed'")
    assert "secret" not in (error or "")


def test_relay_i2_message_that_the_far_side_gives_up_is_parked_and_retried(broker_url: str, relaying: Relaying) -> None:
    # Given an actor that fails there for good
    relaying.far(broker_url, BROKER)
    relaying.relay(broker_url)
    sent = relaying.fails.send("x")
    # When it is given up
    parked = until(relaying.stage.parked, "it is parked")
    # Then an operator sees it, with no word of what it was about
    assert [(reason, attempts) for reason, attempts, _ in parked] == [("poison", 1)]
    assert "RuntimeError" in parked[0][2]
    assert "secret" not in parked[0][2]
    # And a retry hands it on once more
    number = relaying.stage.one("select id from outbox.parked")
    relaying.stage.admin.execute("select outbox.decide('retry', %s::bigint[], 'again', 'test')", ([number],))
    until(lambda: len(relaying.far_runs()) == 4, "it ran again, with its retry")
    assert relaying.messages_of("x") == [sent.message_id]


def test_relay_i6_queue_is_worked_here_or_relayed_and_nothing_is_lost_between(
    redis_server: RedisServer, relaying: Relaying
) -> None:
    stage = relaying.stage
    # Given a queue that is worked here, with one message in hand
    waits = "gate"
    stage.company.waits.send("held", waits)
    relaying.queue = "default"
    worker = stage.work(queues={"default"})
    until(lambda: stage.runs("held"), "it runs")
    # When it shall be relayed meanwhile
    refused = relaying.relay(redis_server.url)
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
    assert relaying.relay_once(redis_server.url)
    # Then all of it was relayed, and a worker here has none of it
    assert redis_server.count("default") == 5
    stage.work(stage.another(), queues={"default"})
    stage.company.note.send("later")
    assert relaying.relay_once(redis_server.url)
    assert (redis_server.count("default"), stage.runs("later")) == (6, 0)
    # When the queue is given back
    given = relaying.relay(redis_server.url, "--give-back")
    assert given.wait(LIMIT) == 0
    stage.company.note.send("here")
    # Then it is worked here
    until(lambda: stage.runs("here"), "it ran here")
    assert redis_server.count("default") == 6


def test_relay_warns_when_a_crash_of_redis_would_lose_messages(redis_server: RedisServer, relaying: Relaying) -> None:
    # Given Redis as Debian configures it
    redis_server.client.config_set("appendonly", "no")
    # Then the relay says what that means; and is silent once nothing is wrong
    assert "appendfsync always" in relaying.relay_once(redis_server.url)
    redis_server.client.config_set("appendonly", "yes")
    assert "appendfsync" not in relaying.relay_once(redis_server.url)


def test_relay_refuses_a_password_on_the_command_line(relaying: Relaying) -> None:
    # When the address on the command line has a password in it
    process = relaying.relay("", "--to", "amqp://me:hush@127.0.0.1")
    _, said = process.communicate(timeout=LIMIT)
    # Then it is refused, and not repeated
    assert process.returncode == 1
    assert "OUTBOX_RELAY" in said
    assert "hush" not in said
