"""What is in a worker's hands: which message is first, how long it stays, and what it does with it in odd moments."""

from __future__ import annotations

import signal
import threading
from uuid import uuid4

import dramatiq
import psycopg
import pytest
import sqlalchemy as sa

from outbox.actor.delivered import Delivered, Hold
from tests.fixtures.actors import Company, Stage
from tests.fixtures.site import LIMIT, until
from workers.actor.channel import Channel

_OWNED = "select count(*) from outbox.lane where target = 'actor.default' and owner is not null"


LATER = 3000
"""Milliseconds. So long that a delayed message is one when it is written, however slow the machine is."""


def _message(number: int, priority: int) -> Delivered:
    message: dramatiq.Message[object] = dramatiq.Message("default", "note", (), {}, {})
    return Delivered(message, id=number, hold=Hold("actor.default", 0, 1, None), priority=priority)


def test_actor_priority_decides_which_message_is_handed_out_first() -> None:
    # Given messages of several priorities that wait for a thread
    channel = Channel("default", "actor.default")
    channel.begin(prefetch=4)
    channel.put([_message(1, 10), _message(2, 0), _message(3, 5), _message(4, 0)])
    # Then the most urgent one is first, and of those the oldest
    given = [channel.get(timeout=1) for _ in range(4)]
    assert [message.id for message in given if message is not None] == [2, 4, 3, 1]
    # And nothing is handed out when all hands are full, or that isn't certain to be ours
    channel.put([_message(5, 0)])
    assert channel.get(timeout=0) is None
    channel.finished()
    strange = _message(6, -1)
    strange.mine = lambda: False
    channel.put([strange])
    assert channel.get(timeout=0) is None


def test_actor_i6_lease_is_renewed_when_the_worker_waits_for_the_database(stage: Stage) -> None:
    # Given a worker with a short lease, that runs something
    company = stage.another(worker=stage.settings("actor", ttl=3.0))
    stage.work(company)
    company.waits.send("x", "gate")
    until(lambda: stage.runs("x") == 1, "it runs")
    # When it has to wait with what it writes down, for longer than the lease
    until_when = "select extract(epoch from min(lease_until)) from outbox.lane where target ~ 'actor'"
    with psycopg.connect(stage.urls["postgres"]) as held:
        held.execute("lock table outbox.position in share mode")
        company.note.send("behind")
        first = stage.one(until_when)
        until(lambda: stage.one(until_when) > first + 4, "the lease was renewed all the same")
    # Then its lanes are still its own
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("x"), stage.runs("behind"), stage.parked()) == (1, 1, [])


def test_actor_i2_decision_is_refused_when_the_message_is_running(stage: Stage) -> None:
    # Given a message that runs, and has a row of its own
    stage.company.waits.send_with_options(args=("x", "gate"), delay=LATER)
    stage.work()
    until(lambda: stage.runs("x") == 1, "it runs")
    number = stage.one("select id from outbox.log")
    # When an operator wants it skipped
    refused = stage.one("select refused from outbox.decide('skip', array[%s::bigint])", number)
    # Then that is refused, and it goes on
    assert "running right now" in refused
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("x"), stage.parked()) == (1, [])


def test_actor_i3_nothing_is_run_again_when_its_worker_dies_right_after_it_has_paid(stage: Stage) -> None:
    # Given an actor that acknowledges in its transaction, and kills its worker after that
    company = stage.company
    company.pays_and_dies.send("x")
    # When its worker is started again
    assert stage.start().wait(LIMIT) == -signal.SIGKILL
    last = stage.start()
    stage.drained()
    # Then it has paid once, and nothing is left
    assert (stage.payments(), stage.runs("x"), stage.parked()) == (["x"], 1, [])
    last.send_signal(signal.SIGTERM)
    assert last.wait(LIMIT) == 0
    assert stage.one("select count(*) from outbox.receipt") == 0


def test_actor_i6_acknowledgement_is_refused_when_the_row_is_anothers(stage: Stage) -> None:
    # Given a message with a row of its own, in the hands of a consumer
    stage.company.note.send_with_options(args=("x",), delay=3_600_000)
    worker = stage.work()
    until(stage.parked, "it is parked")
    stage.forget(worker)
    worker.stop()
    number, holder = stage.one("select id from outbox.log"), uuid4()
    stage.admin.execute("update outbox.parked set reason = 'running', holder = %s, retry_at = null", (holder,))
    done = "select outbox.actor_done(%s, 'actor.default', 0, %s, %s)"
    with psycopg.connect(stage.urls["app"], autocommit=True) as app:
        # When somebody acknowledges who isn't, by a lane that is nobody's or by that row
        for epoch, who in ((0, uuid4()), (0, None), (1, uuid4()), (1, None)):
            with pytest.raises(psycopg.Error, match="not in this worker's hands"):
                app.execute(done, (number, epoch, who))
        # Then only its holder can
        app.execute(done, (number, 1, holder))
    assert stage.parked() == []


def test_actor_i2_zombies_messages_are_not_begun_when_its_row_was_given_to_another(stage: Stage) -> None:
    # Given a worker with one thread, that has delayed messages in hand behind a long one, and is suspended
    stage.company.waits.send("long", "gate")
    zombie = stage.start(OUTBOX_THREADS="1")
    until(lambda: stage.runs("long") == 1, "it runs")
    for n in range(6):
        stage.company.note.send_with_options(args=(f"late {n}",), delay=LATER)
    running = "select count(*) from outbox.parked where reason = 'running'"
    until(lambda: stage.one(running) >= 2, "some are in hand")
    zombie.send_signal(signal.SIGSTOP)
    # When another one has done them
    stage.start(OUTBOX_TTL="15")
    done = "select count(distinct name) from effect where name like 'late%'"
    until(lambda: stage.one(done) == 6, "another one has done them")
    # And the first one wakes up
    zombie.send_signal(signal.SIGCONT)
    stage.open_gate("gate")
    zombie.send_signal(signal.SIGTERM)
    assert zombie.wait(LIMIT) == 0
    # Then it has not begun one of them
    stage.drained()
    assert stage.one("select count(*) from effect where name like 'late%'") == 6


def test_actor_i10_leases_are_renewed_when_actors_acknowledge_all_the_time(stage: Stage) -> None:
    # Given actors that pay as fast as they can, in a queue with one lane: each holds the lane's row for a moment
    company: Company = stage.another(worker=stage.settings("actor", ttl=3.0), lanes=1)
    stop = threading.Event()

    def pays(n: int) -> None:
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values (:name)"), {"name": f"{n}"})
            if not stop.is_set():
                actor.send(n)

    actor = dramatiq.actor(broker=company.broker, actor_name="without_end")(pays)
    for n in range(16):
        actor.send(n)
    stage.work(company, threads=8)
    until(lambda: stage.one(_OWNED) == 1, "the lane is claimed")
    epoch = "select epoch from outbox.lane where target = 'actor.default'"
    first = stage.one(epoch)
    until_when = "select extract(epoch from lease_until) from outbox.lane where target = 'actor.default'"
    begun = stage.one(until_when)
    # When that goes on for twice a lease
    until(lambda: stage.one(until_when) > begun + 6, "it was renewed")
    # Then the lane is still its own, and everything was paid for once
    assert stage.one(epoch) == first
    stop.set()
    stage.drained()
    assert stage.parked() == []
    assert stage.one("select count(*) from payment") == stage.one("select count(*) from outbox.log")
