"""Brokers, relays and far workers are killed in the middle, and everything comes true all the same."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from outbox import Retry, Saga
from outbox.saga.run import Action, Run
from tests.fixtures.brokers import DURABLE, RabbitMQ, RedisServer, need_redis
from tests.fixtures.farside import BROKER, FarSide
from tests.fixtures.site import LIMIT, until
from tests.fixtures.tls import Authority

# With Redis they run in every `make test`; here they meet RabbitMQ, by the fixture below.
from tests.integration.test_relay import (  # noqa: F401
    test_relay_i2_message_that_the_far_side_gives_up_is_parked_and_retried,
    test_relay_i2_messages_run_at_the_far_side_with_their_own_ids,
    test_relay_i7_saga_hears_when_the_far_actor_is_done_and_not_before,
)


@pytest.fixture
def broker_url(rabbitmq: RabbitMQ) -> str:
    return rabbitmq.url


@dataclass
class Order:
    name: str


def _saga(farside: FarSide) -> Saga[Order]:
    saga = Saga("order", Order)

    @saga.intent(kind="pivot", retry=Retry(attempts=1))
    def tell(run: Run[Order]) -> Action:
        return farside.broker.action(farside.note.message(run.input.name))

    return saga


def _send(farside: FarSide, *names: str) -> set[str]:
    for name in names:
        farside.note.send(name)
    return set(names)


def _came_true(farside: FarSide, names: set[str]) -> None:
    """Each ran, under one id, and nothing else did; nothing is left, and nothing is parked."""
    farside.wait_for(names)
    assert set(farside.far_runs()) == names
    assert all(len(farside.messages_of(name)) == 1 for name in names)
    until(partial(farside.stage.one, "select outbox.queue_idle(%s)", farside.target), "everything is handed on")
    assert farside.stage.parked() == []


@pytest.fixture(params=["rabbitmq", "redis"])
def broker(request: pytest.FixtureRequest) -> RabbitMQ | RedisServer:
    made: RabbitMQ | RedisServer = request.getfixturevalue(
        "rabbitmq" if request.param == "rabbitmq" else "redis_server"
    )
    return made


def test_relay_faults_i2_nothing_is_lost_when_the_broker_is_killed_and_stays_away(
    broker: RabbitMQ | RedisServer, farside: FarSide
) -> None:
    # Given a relay that has handed messages on, which wait at the broker
    relay = farside.relay(broker.url)
    names = _send(farside, *(f"before {n}" for n in range(200)))
    until(lambda: broker.count(farside.queue) >= 200, "they wait there")
    # When the broker is killed while more are on their way, and is away for a while
    names |= _send(farside, *(f"during {n}" for n in range(200)))
    broker.kill()
    names |= _send(farside, *(f"away {n}" for n in range(20)))
    waiting = "select count(*) from outbox.lane where target = %s and state = 'waiting'"
    until(lambda: farside.stage.one(waiting, farside.target), "a lane waits for the broker")
    # Then nothing is parked for that; and once it is back, everything runs
    assert farside.stage.parked() == []
    broker.start()
    farside.far(broker.url)
    _came_true(farside, names)
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(LIMIT) == 0


@pytest.mark.parametrize("name", ["relay.noted", "relay.confirmed", "relay.heard", "reader.applied", "lane.advanced"])
def test_relay_faults_i2_i7_i11_everything_comes_true_when_the_relay_is_killed_at(
    redis_server: RedisServer, farside: FarSide, name: str
) -> None:
    # Given messages, steps of sagas, and a far worker
    stage, saga = farside.stage, _saga(farside)
    farside.far(redis_server.url, BROKER)
    with stage.engine(saga):
        names = _send(farside, *(f"note {n}" for n in range(20)))
        with stage.company.sessions.begin() as session:
            started = [saga.start(session, Order(f"step {n}")) for n in range(5)]
        names |= {f"step {n}" for n in range(5)}
        # When the relay is killed at the failpoint
        killed = farside.relay(redis_server.url, OUTBOX_FAILPOINT=name)
        assert killed.wait(LIMIT) == -signal.SIGKILL, f"{name} was not reached"
        # Then the next one brings everything to its end
        farside.relay(redis_server.url)
        ended = "select count(*) from outbox.saga where id = any(%s) and state = 'completed'"
        until(lambda: stage.one(ended, started) == len(started), "the sagas are completed")
    _came_true(farside, names)
    assert stage.one("select count(*) from outbox.relayed where verdict is distinct from 'applied'") == 0


def test_relay_faults_i2_i7_saga_hears_of_its_step_when_the_far_worker_is_killed(
    rabbitmq: RabbitMQ, farside: FarSide
) -> None:
    # Given a far worker in a process of its own
    stage, saga = farside.stage, _saga(farside)
    far = farside.far(rabbitmq.url, BROKER)
    farside.relay(rabbitmq.url)
    with stage.engine(saga):
        with stage.company.sessions.begin() as session:
            started = [saga.start(session, Order(f"step {n}")) for n in range(100)]
        # When it is killed in the middle of them
        until(lambda: len(farside.far_runs()) > 10, "some ran")
        far.kill()
        farside.far(rabbitmq.url, BROKER)
        # Then each saga hears
        ended = "select count(*) from outbox.saga where id = any(%s) and state = 'completed'"
        until(lambda: stage.one(ended, started) == len(started), "the sagas are completed")
    _came_true(farside, {f"step {n}" for n in range(100)})


def test_relay_faults_i3_i10_nothing_is_sent_twice_when_rabbitmq_blocks_publishers(
    rabbitmq: RabbitMQ, farside: FarSide
) -> None:
    # Given a relay with connections, and then RabbitMQ with too little memory
    farside.relay(rabbitmq.url)
    names = _send(farside, *(f"before {n}" for n in range(50)))
    until(lambda: rabbitmq.count(farside.queue) == 50, "they wait there")
    rabbitmq.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        # When messages are sent
        names |= _send(farside, *(f"blocked {n}" for n in range(50)))
        # Then lanes wait, and say for what
        why = "select reason from outbox.lane where target = %s and state = 'waiting' and reason ~ 'memory'"
        until(lambda: farside.stage.one(why, farside.target), "a lane waits")
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
    # And when it has memory again, each message is there once
    until(partial(farside.stage.one, "select outbox.queue_idle(%s)", farside.target), "everything is handed on")
    assert rabbitmq.count(farside.queue) == 100
    farside.far(rabbitmq.url)
    _came_true(farside, names)
    assert len(farside.far_runs()) == 100


def test_relay_faults_i2_message_too_large_for_rabbitmq_is_parked_and_others_go_on(
    rabbitmq: RabbitMQ, farside: FarSide
) -> None:
    # Given RabbitMQ that takes no more than 20 kB, and one message of more between others
    for name in ("a", "x" * 30_000, "b"):
        farside.note.send(name)
    # When they are relayed
    farside.relay_once(rabbitmq.url)
    # Then the others are there, and that one is parked
    farside.far(rabbitmq.url)
    farside.wait_for({"a", "b"})
    assert [(reason, error) for reason, _, error in farside.stage.parked()] == [
        ("poison", "the broker refuses it, most likely as too large: raise its limit, or skip this intent")
    ]
    assert rabbitmq.count(farside.queue) == 0


def test_relay_faults_checks_the_certificate_of_rabbitmq(rabbitmq: RabbitMQ, farside: FarSide) -> None:
    # Given RabbitMQ with a certificate of an authority that nobody trusts
    farside.note.send("x")
    # When the relay hasn't been told of that authority, and when it has
    untrusting = farside.relay(rabbitmq.tls_url)
    why = "select reason from outbox.lane where target = %s and state = 'waiting' and reason ~ 'reached'"
    until(lambda: farside.stage.one(why, farside.target), "a lane waits")
    untrusting.send_signal(signal.SIGTERM)
    untrusting.communicate(timeout=LIMIT)
    # Then the message goes with the second one, and not with the first
    assert rabbitmq.count(farside.queue) == 0
    farside.relay_once(rabbitmq.tls_url, OUTBOX_RELAY_CA_FILE=str(rabbitmq.ca_file))
    assert rabbitmq.count(farside.queue) == 1


def test_relay_faults_checks_the_certificate_of_redis(authority: Authority, farside: FarSide, tmp_path: Path) -> None:
    # Given Redis with a certificate of an authority that nobody trusts
    need_redis()
    server = RedisServer(tmp_path, *DURABLE, tls=authority.certificate())
    server.start()
    try:
        farside.note.send("x")
        # When the relay hasn't been told of that authority
        untrusting = farside.relay(server.tls_url)
        why = "select reason from outbox.lane where target = %s and state = 'waiting' and reason ~ 'reached'"
        until(lambda: farside.stage.one(why, farside.target), "a lane waits")
        # Then nothing went there; and it goes when the relay trusts it
        assert server.count(farside.queue) == 0
        untrusting.send_signal(signal.SIGTERM)
        untrusting.communicate(timeout=LIMIT)
        farside.relay_once(server.tls_url, OUTBOX_RELAY_CA_FILE=str(authority.ca_file))
        assert server.count(farside.queue) == 1
    finally:
        server.kill()


def test_relay_faults_i2_i7_message_stays_until_what_became_of_it_can_be_told(
    rabbitmq: RabbitMQ, farside: FarSide
) -> None:
    # Given a far worker that is to tell Postgres, and can't reach it
    stage, saga = farside.stage, _saga(farside)
    farside.relay(rabbitmq.url)
    cut_off = farside.far(rabbitmq.url, "postgresql://app@/nothing?host=/nowhere")
    with stage.engine(saga):
        with stage.company.sessions.begin() as session:
            started = saga.start(session, Order("x"))
        # When it has run the step, and dies without having told
        until(farside.far_runs, "it ran")
        until(lambda: "stays unacknowledged" in farside.far_said(), "it can't tell")
        cut_off.kill()
        cut_off.wait(LIMIT)
        assert stage.one("select ended_at from outbox.saga where id = %s", started) is None
        # Then the next one has the message again, and tells
        farside.far(rabbitmq.url, stage.urls["app"])
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        assert until(lambda: stage.one(ended, started), "the saga ends") == "completed"
    assert len(farside.far_runs()) >= 2
    assert len(farside.messages_of("x")) == 1


def test_relay_faults_i2_what_a_killed_worker_had_in_hand_is_relayed(
    redis_server: RedisServer, farside: FarSide
) -> None:
    # Given a worker here that dies with a message in hand
    stage = farside.stage
    farside.queue = "default"
    stage.company.waits.send("held", "gate")
    worker = stage.start("default")
    until(lambda: stage.runs("held"), "it runs")
    worker.kill()
    worker.wait(LIMIT)

    # When the queue is relayed, which is refused until the dead one's lease is over
    def relayed() -> bool:
        process = farside.relay(redis_server.url, "--until-idle")
        _, said = process.communicate(timeout=LIMIT)
        assert process.returncode == 0 or "is worked here" in said, said
        return process.returncode == 0

    until(relayed, "the queue is relayed")
    # Then that message was handed on
    assert redis_server.count("default") == 1
    assert stage.parked() == []
