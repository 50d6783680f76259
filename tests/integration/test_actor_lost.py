"""Where a message of an actor could get lost: answers that never come, hand-overs, suspended workers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from outbox.actor.letter import intent_of
from outbox.settings import Settings
from tests.fixtures.actors import Company, Stage
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import LIMIT, until

LATER = 3000
"""Milliseconds. So long that a delayed message is one when it is written, however slow the machine is."""


@pytest.fixture
def far(stage: Stage, proxy: Proxy) -> Callable[..., Company]:
    """Makes the actors of a process whose worker reaches the database through the proxy."""

    def make(ttl: float = 15.0, **options: Any) -> Company:
        url = proxy.url("actor", stage.database)
        return stage.another(worker=Settings(url, None, None, "smtp://127.0.0.1:1", ttl=ttl), **options)

    return make


def test_actor_i2_message_runs_when_the_answer_to_its_take_never_came(
    stage: Stage, proxy: Proxy, far: Callable[..., Company]
) -> None:
    # Given a worker, and a network that swallows the answer to the statement that takes delayed messages in hand
    company = far()
    stage.work(company)
    stage.drained()
    proxy.cut_reply("for update of p skip locked")
    # When one is due
    company.note.send_with_options(args=("late",), delay=LATER)
    until(lambda: proxy.has_cut, "the answer was swallowed")
    # Then it runs, though the database had it as being in hand, and no death is held against it
    stage.drained()
    assert (stage.runs("late"), stage.parked()) == (1, [])


def test_actor_i2_i3_message_runs_once_when_the_answer_to_its_lanes_release_never_came(
    stage: Stage, proxy: Proxy, far: Callable[..., Company]
) -> None:
    # Given a worker that runs something long, with more behind, in a queue with one lane
    company = far(lanes=1)
    worker = stage.work(company, threads=1)
    company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    for n in range(10):
        company.note.send(f"n{n}")
    until(lambda: worker.work_queue.qsize() == 1, "one more was fetched")
    # When it gives its lane back, and the answer to that COMMIT never comes
    proxy.cut_commit("after")
    ending = threading.Thread(target=worker.stop)
    stage.forget(worker)
    ending.start()
    until(lambda: proxy.has_cut, "the answer was swallowed")
    until(lambda: stage.one("select count(*) from outbox.parked where reason = 'running'"), "it has a row of its own")
    # And another worker has the rest, while the first one goes on
    stage.work(stage.another())
    done = "select count(distinct name) from effect where name like 'n%'"
    until(lambda: stage.one(done) == 10 or stage.one(done) == 9, "the others are done elsewhere")
    stage.open_gate("gate")
    ending.join()
    # Then each ran once
    stage.drained()
    assert (stage.one("select count(*) from effect"), stage.one(done), stage.parked()) == (11, 10, [])


def test_actor_i2_i3_messages_run_elsewhere_when_their_lane_could_not_be_given_back_at_once(
    stage: Stage, proxy: Proxy, far: Callable[..., Company]
) -> None:
    # Given a worker whose one thread is taken, with more behind that nobody has begun, in a queue with one lane
    company = far(lanes=1)
    worker = stage.work(company, threads=1)
    company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    for n in range(10):
        company.note.send(f"n{n}")
    until(lambda: worker.work_queue.qsize() == 1, "one more was fetched")
    until(lambda: len(company.broker._delivery._channels["actor.default"]) == 4, "more are claimed")
    # When another worker comes, and the connection is cut as the first one leaves its lane to it
    proxy.cut_commit("before")
    stage.work(stage.another())
    until(lambda: proxy.has_cut, "the connection was cut")
    # Then the other one has them, while the first one goes on
    done = "select count(distinct name) from effect where name like 'n%'"
    until(lambda: stage.one(done) == 9, "the others are done elsewhere")
    stage.open_gate("gate")
    stage.drained()
    assert (stage.one("select count(*) from effect"), stage.one(done), stage.parked()) == (11, 10, [])


@pytest.mark.parametrize("delay", [None, LATER], ids=["lane", "row"])
def test_actor_i2_message_runs_when_its_worker_was_not_sure_of_its_lease_for_a_while(
    stage: Stage, proxy: Proxy, far: Callable[..., Company], delay: int | None
) -> None:
    # Given a worker whose one thread is taken, with one more in dramatiq's hands, of a lane or with a row of its own
    company = far(ttl=5.0, lanes=1)
    worker = stage.work(company, threads=1)
    company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    company.note.send_with_options(args=("fetched",), delay=delay)
    until(lambda: worker.work_queue.qsize() == 1, "it was fetched")
    delivery = company.broker._delivery
    (fetched,) = [message for message in delivery._estate.out.values() if message.args == ("fetched",)]
    # When the network is away for longer than the lease is certain, and the thread gets to it meanwhile
    proxy.hold("outbox actor")
    until(lambda: not fetched.mine(), "the lease is not certain any more")
    stage.open_gate("gate")
    until(lambda: worker.work_queue.qsize() == 0, "the thread has looked at it")
    assert stage.runs("fetched") == 0
    # Then it runs when the network is back: nobody else has claimed the lane
    proxy.heal()
    stage.drained()
    assert (stage.runs("long"), stage.runs("fetched"), stage.parked()) == (1, 1, [])


def test_actor_i2_steps_of_sagas_are_run_when_the_database_is_lost_as_they_are_read(
    stage: Stage, proxy: Proxy, far: Callable[..., Company]
) -> None:
    # Given a worker, whose connection is cut after it has read a step of a saga, and before it has asked about it
    company = far()
    stage.work(company)
    stage.drained()
    proxy.cut_statement("outbox.saga_void")
    # When there is one
    with company.sessions.begin() as session:
        company.outbox.append(session, intent_of(company.note.message("step"), saga=uuid4()))
    until(lambda: proxy.has_cut, "the connection was cut")
    # Then it is read again
    stage.drained()
    assert stage.runs("step") == 1


def test_actor_i2_running_message_runs_again_when_its_worker_dies_after_its_lane_was_handed_over(stage: Stage) -> None:
    # Given a worker that ends, and has given its lanes away, while something long still runs
    stage.company.waits.send("long", "gate")
    first = stage.start(OUTBOX_TTL="15")
    until(lambda: stage.runs("long") == 1, "it runs")
    first.send_signal(signal.SIGTERM)
    until(lambda: stage.one("select reason from outbox.parked") == "running", "it has a row of its own")
    second = stage.start(OUTBOX_TTL="15")
    stage.company.note.send("other")
    until(lambda: stage.runs("other") == 1, "another worker has the lanes")
    # When it is killed
    first.kill()
    assert first.wait(LIMIT) == -signal.SIGKILL
    # Then the message runs at the other one
    until(lambda: stage.runs("long") == 2, "it runs again")
    stage.open_gate("gate")
    stage.drained()
    assert (second.poll(), stage.parked()) == (None, [])


def test_actor_i3_i6_positions_are_not_written_when_the_lane_is_anothers(stage: Stage) -> None:
    # Given a worker that is suspended when it has taken a delayed message, before it reads on
    stage.company.note.send_with_options(args=("late",), delay=LATER)
    zombie = stage.start(OUTBOX_FAILPOINT="actor.taken:stop")
    until(lambda: _stopped(zombie.pid), "it is suspended")
    # When another one does all the rest
    for n in range(20):
        stage.company.note.send(f"n{n}")
    second = stage.start(OUTBOX_TTL="15")
    stage.drained()
    # And the first one wakes up, and reads on where it was
    zombie.send_signal(signal.SIGCONT)
    zombie.send_signal(signal.SIGTERM)
    assert zombie.wait(LIMIT) == 0
    stale = "select count(*) from outbox.position p join outbox.lane l using (target, lane) where p.epoch < l.epoch"
    newest = "p.seq = (select max(seq) from outbox.position n where n.target = p.target and n.lane = p.lane)"
    assert stage.one(f"{stale} and p.target = 'actor.default' and {newest}") == 0
    second.kill()
    second.wait(LIMIT)
    # Then its successors don't begin where it was: each has run once
    stage.start()
    stage.drained()
    assert stage.one("select count(*) from effect where name like 'n%'") == 20


def test_actor_i10_suspects_are_tried_when_others_lanes_have_messages_that_are_due(stage: Stage) -> None:
    # Given a lane whose owner, elsewhere, is too busy for a message that is due; and one in a lane of ours that was in
    # hand when its worker died
    stage.company.broker.registered("default")
    stage.work()
    for n in range(16):
        stage.company.note.send_with_options(args=(f"n{n}",), delay=24 * 3600 * 1000)
    until(lambda: len(stage.parked()) == 16, "they are parked")
    busy, free = stage.admin.execute(
        "select min(p.id) filter (where l.lane = 0), min(p.id) filter (where l.lane <> 0) from outbox.parked p"
        " join outbox.lane l on l.target = p.target and p.slot between l.slot_low and l.slot_high"
    ).fetchone() or (None, None)
    assert busy is not None
    assert free is not None
    stage.admin.execute(
        "update outbox.lane set epoch = epoch + 1, owner = gen_random_uuid(), place = 'elsewhere',"
        " lease_until = now() + interval '1 hour' where target = 'actor.default' and lane = 0"
    )
    # When both are due
    stage.admin.execute("update outbox.parked set retry_at = now() where id = %s", (busy,))
    stage.admin.execute(
        "update outbox.parked set reason = 'retry', deaths = 1, retry_at = now() where id = %s", (free,)
    )
    # Then the one in the free lane is tried
    until(lambda: stage.one("select count(*) from effect") == 1, "it is tried")
    assert stage.one("select reason from outbox.parked where id = %s", busy) == "due"


def test_actor_i10_other_queues_go_on_when_one_has_many_messages_due_and_no_hands(stage: Stage) -> None:
    # Given a worker of two queues, whose hands are full in the first one
    worker = stage.work(threads=1)
    stage.company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    until(lambda: worker.work_queue.qsize() == 0, "nothing else was fetched")
    for n in range(1200):
        stage.company.note.send_with_options(args=(f"n{n}",), delay=3_600_000)
    stage.company.other.send_with_options(args=("other",), delay=3_600_000)
    until(lambda: stage.one("select count(*) from outbox.parked") == 1201, "they are parked")
    # When more are due there than a look takes in, and one in the other queue
    stage.admin.execute("update outbox.parked set retry_at = now() - interval '1 min' where target = 'actor.default'")
    stage.admin.execute("update outbox.parked set retry_at = now() where target = 'actor.other'")
    # Then that one is taken in hand
    taken = "select count(*) from outbox.parked where target = 'actor.other' and reason = 'running'"
    until(lambda: stage.one(taken) == 1, "it is taken in hand")
    stage.admin.execute("delete from outbox.parked where reason = 'due'")
    stage.open_gate("gate")
    stage.drained("default", "other")
    assert stage.runs("other") == 1


def test_actor_i2_retries_in_hand_go_to_others_when_their_worker_ends(stage: Stage) -> None:
    # Given a worker that runs something long, with delayed messages in its hands that nobody has begun
    worker = stage.work(threads=1)
    stage.company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    for n in range(6):
        stage.company.note.send_with_options(args=(f"late {n}",), delay=LATER)
    running = "select count(*) from outbox.parked where reason = 'running'"
    until(lambda: stage.one(running) >= 3, "they are in hand")
    # When it ends, and another one is there
    stage.forget(worker)
    ending = threading.Thread(target=worker.stop)
    ending.start()
    stage.work(stage.another())
    # Then the other one has what dramatiq had not fetched, though the first one still runs
    done = "select count(distinct name) from effect where name like 'late%'"
    until(lambda: stage.one(done) >= 5, "they are done elsewhere")
    assert ending.is_alive()
    stage.open_gate("gate")
    ending.join()
    stage.drained()
    assert (stage.one("select count(*) from effect"), stage.parked()) == (7, [])


def _stopped(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    return stat.rpartition(")")[2].split()[0] == "T"
