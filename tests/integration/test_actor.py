"""Actors of dramatiq on the log: what is sent, when it is delivered, and what becomes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import dramatiq
import psycopg
import pytest
import sqlalchemy as sa
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.middleware import Middleware, MiddlewareError
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Retry, Saga, status, whereabouts
from outbox.actor import OutboxBroker
from outbox.actor.letter import target_of
from outbox.errors import IntentRefused, NotReady, PayloadInvalid
from outbox.saga.run import Action, Run
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until
from workers.actor import channel

# ----------------------------------------------------------------------------------------------- sending


def test_actor_i1_i2_send_commits_with_the_session_when_one_is_in_a_transaction(stage: Stage) -> None:
    # Given an application with an attached sessionmaker
    company = stage.company
    # When it sends in transactions that commit, roll back, or roll back to a savepoint
    with company.sessions.begin() as session:
        company.note.send("committed")
        with session.begin_nested() as savepoint:
            company.note.send("savepoint")
            savepoint.rollback()
        assert stage.one("select count(*) from outbox.log") == 0
    with pytest.raises(ZeroDivisionError), company.sessions.begin():
        company.note.send("never")
        raise ZeroDivisionError
    # And outside of one
    company.note.send("at once")
    # Then only what committed is in the log
    sent = stage.admin.execute("select payload #>> '{args,0}' from outbox.log order by id").fetchall()
    assert sent == [("committed",), ("at once",)]


def test_actor_send_is_refused_when_two_sessions_are_in_a_transaction(stage: Stage) -> None:
    # Given two open transactions in one thread
    company = stage.company
    with company.sessions.begin(), company.sessions.begin() as second:
        # When something is sent, nobody can tell with which one
        with pytest.raises(IntentRefused, match="several sessions"):
            company.note.send("which")
        # Then the application says so
        with company.broker.using(second):
            company.note.send("second")
    assert stage.one("select count(*) from outbox.log") == 1


def test_actor_send_is_not_another_databases_affair_when_a_session_of_another_outbox_is_open(stage: Stage) -> None:
    # Given a session that is attached to another outbox
    engine = sa.create_engine(stage.app.sqlalchemy_url)
    other: sessionmaker[Session] = sessionmaker(engine)
    Outbox(other, stage.app)
    # When something is sent in its transaction, which rolls back
    with other() as session:
        session.execute(sa.text("select 1"))
        stage.company.note.send("own")
    # Then it is sent all the same
    assert stage.one("select count(*) from outbox.log") == 1
    engine.dispose()


def test_actor_send_runs_once_when_an_actor_sends_in_its_own_transaction(stage: Stage) -> None:
    # Given an actor that sends in a transaction of its own, and fails the first time
    company, tries = stage.company, []

    @dramatiq.actor(broker=company.broker, min_backoff=50, max_backoff=50)
    def parent() -> None:
        tries.append(1)
        with company.broker.transaction():
            company.note.send("child")
            if len(tries) == 1:
                raise RuntimeError("before the commit")

    # When it runs twice
    parent.send()
    stage.work()
    stage.drained()
    # Then the child was sent by the try that committed
    assert (len(tries), stage.runs("child")) == (2, 1)


def test_actor_pickle_is_refused_when_it_is_dramatiqs_encoder(stage: Stage) -> None:
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(dramatiq.PickleEncoder())
    try:
        with pytest.raises(PayloadInvalid, match="JSONEncoder"):
            stage.company.note.send("x")
    finally:
        dramatiq.set_encoder(before)
    assert stage.one("select count(*) from outbox.log") == 0


@pytest.mark.parametrize(
    ("queue", "target"),
    [("default", "actor.default"), ("default.DQ", "actor.default"), ("Mail-Out", "actor.mail-out.6e3ba10e")],
)
def test_actor_queue_is_a_participant_of_its_own(queue: str, target: str) -> None:
    assert target_of(queue) == target or (queue == "Mail-Out" and target_of(queue).startswith("actor.mail-out."))
    assert target_of("q" * 100) != target_of("q" * 101)
    assert len(target_of("q" * 100)) <= 63


# -------------------------------------------------------------------------------------------- delivering


@pytest.mark.parametrize("eta", [None, "not-a-number", 17.5, True])
def test_actor_i2_message_runs_when_its_eta_is_odd(stage: Stage, eta: object) -> None:
    stage.company.note.send_with_options(args=("odd",), eta=eta)
    stage.work()
    stage.drained()
    assert stage.runs("odd") == 1


def test_actor_i2_delayed_message_waits_in_the_log_when_it_is_sent(stage: Stage) -> None:
    # Given a message for tomorrow, and a worker
    stage.company.note.send_with_options(args=("tomorrow",), delay=24 * 3600 * 1000)
    stage.company.note.send("now")
    stage.work()
    until(lambda: stage.parked() == [("due", 0, "")], "it is parked until then")
    until(lambda: stage.runs("now") == 1, "the other one has run")
    assert stage.runs("tomorrow") == 0
    # When the day has come
    stage.admin.execute("update outbox.parked set retry_at = now()")
    stage.drained()
    # Then it runs
    assert (stage.runs("tomorrow"), stage.parked()) == (1, [])


def test_actor_i2_position_goes_on_when_a_message_runs_for_long(stage: Stage) -> None:
    # Given a message that runs until the gate is open, in a queue with one lane
    company = stage.another(lanes=1)
    company.waits.send("long", "gate")
    stage.work(company)
    until(lambda: stage.runs("long") == 1, "it runs")
    # When others come after it
    for n in range(50):
        company.note.send(f"n{n}")
    # Then they are done, and the lane's position is behind all of them, with the long one open
    first = stage.one("select min(id) from outbox.log")
    newest = "select open from outbox.position where target = 'actor.default' order by seq desc limit 1"
    done = "select count(*) from effect where name like 'n%'"
    until(lambda: stage.one(done) == 50 and stage.one(newest) == [first], "only the long one is open")
    behind = (
        "select sum(l.id) from outbox.log l, (select * from outbox.position order by seq desc limit 1) p, outbox.tick t"
    )
    assert stage.one(f"{behind} where t.id = p.tick and not pg_visible_in_snapshot(l.xid, t.snapshot)") is None
    # And it is not said to be reached before it is done
    xid = stage.one("select xid::text from outbox.log order by id limit 1")
    reached = "select outbox.reached(%s::text::xid8, 'actor.default')"
    assert stage.one(reached, xid) is False
    stage.open_gate("gate")
    until(lambda: stage.one(reached, xid) is True, "it is reached")


def test_actor_priority_decides_in_each_worker_when_several_share_a_queue(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given two workers with a lane and a thread each, which is taken
    monkeypatch.setattr(channel, "BUSY_AFTER", 100 * LIMIT)
    first, second = (stage.another(lanes=2) for _ in range(2))
    first.broker.registered("default")
    for company in (first, second):
        stage.work(company, threads=1)
    owners = "select count(distinct owner) from outbox.lane where target = 'actor.default'"
    until(lambda: stage.one(owners) == 2, "each has a lane")
    for lane in (0, 1):
        first.broker.enqueue(_in_lane(stage, lane, first.waits, f"held {lane}", "gate"))
    until(lambda: stage.one("select count(*) from effect") == 2, "both threads are taken")
    # When an urgent message comes with some that are not, and behind them
    with first.sessions.begin():
        for lane in (0, 1):
            for name in ("late a", "late b"):
                first.broker.enqueue(_in_lane(stage, lane, first.naps, f"{name} {lane}", 0.0))
            first.broker.enqueue(_in_lane(stage, lane, first.note, f"soon {lane}"))
    claimed = "select sum(cardinality(open)) from (select distinct on (lane) open from outbox.position"
    until(lambda: stage.one(f"{claimed} where target = 'actor.default' order by lane, seq desc) p") == 8, "all claimed")
    stage.open_gate("gate")
    stage.drained()
    # Then each worker runs it first
    for lane in (0, 1):
        ran = stage.admin.execute("select name from effect where name ~ %s order by seq", (f"^(late|soon).*{lane}$",))
        assert [name for (name,) in ran] == [f"soon {lane}", f"late a {lane}", f"late b {lane}"]


def _in_lane(stage: Stage, lane: int, actor: dramatiq.Actor[..., Any], *words: object) -> dramatiq.Message[Any]:
    """A message that falls into this lane of two."""
    while True:
        message: dramatiq.Message[Any] = actor.message(*words)
        if stage.one("select outbox.slot(%s) / 8192", message.message_id) == lane:
            return message


def test_actor_prefetch_bounds_what_a_worker_has_when_its_threads_are_taken(stage: Stage) -> None:
    # Given one thread, which is taken
    worker = stage.work(threads=1)
    stage.company.waits.send("first", "gate")
    until(lambda: stage.runs("first") == 1, "it runs")
    # When many messages come
    for n in range(20):
        stage.company.note.send(f"n{n}")
    until(lambda: worker.work_queue.qsize() == 1, "one more was fetched")
    channel = stage.company.broker._delivery._channels["actor.default"]
    until(lambda: len(channel) == 4, "as many again are claimed for it")
    # Then dramatiq has two, and the rest is in the log
    assert (worker.work_queue.qsize(), channel._out) == (1, 2)
    stage.open_gate("gate")
    stage.drained()


def test_actor_i2_worker_of_one_queue_leaves_the_others_alone(stage: Stage) -> None:
    # Given messages in two queues, and a worker of one of them
    for n in range(20):
        stage.company.other.send(f"other {n}")
        stage.company.note.send(f"note {n}")
    stage.work(queues={"default"})
    stage.drained("default")
    # Then the other queue waits, as a whole, for a worker of its own
    assert stage.one("select count(*) from effect where name like 'note%'") == 20
    assert stage.one("select count(*) from effect where name like 'other%'") == 0
    second = stage.another()
    stage.work(second, queues={"other"})
    stage.drained("other")
    assert stage.one("select count(*) from effect where name like 'other%'") == 20


def test_actor_i6_new_consumer_takes_back_what_the_old_one_delivered(stage: Stage) -> None:
    # Given a consumer that has given out a message, and was replaced (dramatiq does so after an error)
    broker = stage.company.broker
    stage.company.note.send("x")
    old = broker.consume("default", prefetch=4, timeout=1000)
    message = until(lambda: next(old), "it is delivered")
    new = broker.consume("default", prefetch=4, timeout=1000)
    # When the message is acknowledged at the new one
    new.ack(message)
    # Then it is done
    stage.drained()
    assert stage.one("select count(*) from outbox.parked") == 0
    old.close()


def test_actor_i2_messages_come_back_when_they_are_requeued(stage: Stage) -> None:
    # Given messages that were fetched and not begun
    broker = stage.company.broker
    for n in range(6):
        stage.company.note.send(f"n{n}")
    consumer = broker.consume("default", prefetch=6, timeout=1000)
    messages = [until(lambda: next(consumer), "it is delivered") for _ in range(6)]
    # When the worker ends
    consumer.requeue(iter(messages))
    consumer.requeue([])
    consumer.close()
    # Then the next one runs them, and counts no death
    stage.work()
    stage.drained()
    assert [stage.runs(f"n{n}") for n in range(6)] == [1] * 6


# ------------------------------------------------------------------------------------------------- failing


def test_actor_i2_failed_message_is_parked_and_tried_again_until_it_is_dead(stage: Stage) -> None:
    # Given an actor that always fails, twice retried
    stage.company.fails.send("x")
    stage.company.note.send("y")
    stage.work()
    stage.drained()
    # Then it ran three times and is parked, by kind and place, without a word of what it said
    ((reason, attempts, error),) = stage.parked()
    assert (reason, attempts, stage.runs("x"), stage.runs("y")) == ("poison", 3, 3, 1)
    assert error.startswith("fails raised RuntimeError at ")
    assert "secret" not in stage.one("select string_agg(p::text, '') from outbox.parked p")
    # When an operator lets it be tried again
    number = stage.one("select id from outbox.parked")
    stage.admin.execute("select outbox.decide('retry', array[%s::bigint])", (number,))
    # Then it has all its retries anew
    until(lambda: stage.runs("x") == 6, "it ran three times more")
    stage.drained()
    assert [row[:2] for row in stage.parked()] == [("poison", 3)]


def test_actor_i2_retry_keeps_its_options_and_leaves_nothing_behind_when_it_succeeds(stage: Stage) -> None:
    # Given a message that fails once, with an option of its own, and a middleware that looks
    seen: list[dict[str, Any]] = []

    class Look(Middleware):
        def before_process_message(self, _broker: dramatiq.Broker, message: Any) -> None:
            seen.append(dict(message.options))
            message.options["seen"] = len(seen)

    stage.company.broker.add_middleware(Look())
    stage.company.flaky.send_with_options(args=("x",), colour="red")
    stage.work()
    stage.drained()
    # Then the second try knew what the first one had left
    assert seen[0] == {"colour": "red"}
    assert {"colour": "red", "retries": 1, "seen": 1}.items() <= seen[1].items()
    assert "eta" not in seen[1]
    assert (stage.runs("x"), stage.parked(), stage.one("select count(*) from outbox.receipt")) == (2, [], 0)


def test_actor_i2_message_is_not_acknowledged_when_its_retry_could_not_be_enqueued(stage: Stage) -> None:
    # Given a middleware that refuses what is enqueued again, where dramatiq hides the error
    refused: list[str] = []

    class Refuse(Middleware):
        def before_enqueue(self, _broker: dramatiq.Broker, message: Any, _delay: int | None) -> None:
            if message.options.get("retries") == 1 and not refused:
                refused.append(message.message_id)
                raise MiddlewareError("the database is away")

    stage.company.broker.add_middleware(Refuse())
    # When an actor fails
    stage.company.flaky.send("x")
    stage.work()
    until(lambda: refused, "its retry was refused")
    stage.drained()
    # Then it was tried again all the same
    assert stage.runs("x") == 2


def test_actor_i2_message_is_put_back_when_its_actor_is_not_deployed_yet(stage: Stage) -> None:
    # Given an application that knows an actor which the workers don't have yet
    newer = stage.another()
    added = dramatiq.actor(broker=newer.broker, actor_name="added")(newer._note)
    added.send("new")
    worker = stage.work()
    until(lambda: [row[:2] for row in stage.parked()] == [("retry", 1)], "it is put back")
    assert "there is no actor added" in stage.parked()[0][2]
    # When the workers that have it take over
    worker.stop()
    stage._workers.remove(worker)
    stage.work(newer)
    stage.admin.execute("update outbox.parked set retry_at = now() where reason = 'retry'")
    # Then it runs
    until(lambda: stage.runs("new") == 1, "it ran")
    stage.drained()


def test_actor_i2_message_of_a_missing_actor_is_parked_when_it_was_put_back_often_enough(stage: Stage) -> None:
    newer = stage.another()
    dramatiq.actor(broker=newer.broker, actor_name="gone")(newer._note).send("x")
    stage.company.broker.missing = 2
    stage.work()
    until(lambda: stage.parked() and stage.parked()[0][1] == 1, "it is put back once")

    def hurry() -> bool:
        stage.admin.execute("update outbox.parked set retry_at = now() where reason = 'retry'")
        return bool(stage.parked()) and stage.parked()[0][0] == "poison"

    until(hurry, "it is parked for good")
    assert "ActorNotFound" in stage.parked()[0][2]


def test_actor_i2_what_is_no_message_is_parked_and_nothing_stops(stage: Stage) -> None:
    # Given things that somebody wrote into a queue by hand
    stage.company.broker.registered("default")
    message = json.loads(stage.company.note.message("y").encode())
    odd = {
        "queue_name": 5, "actor_name": ["note"], "args": "ab", "kwargs": [], "options": None, "message_id": {},
        "message_timestamp": "now",
    }  # fmt: skip
    no_message = [("send", '{"not": "a message"}'), ("other", "{}"), ("send", "1e5000"), ("send", "[1]")]
    no_message += [("send", json.dumps({**message, field: value})) for field, value in odd.items()]
    for action, payload in no_message:
        stage.admin.execute("select outbox.emit('actor.default', %s, 'k', %s)", (action, payload))
    stage.company.note.send("x")
    stage.work()
    stage.drained()
    # Then each is parked, with what to do
    assert (stage.runs("x"), [row[0] for row in stage.parked()]) == (1, ["poison"] * len(no_message))


# -------------------------------------------------------------------------------------------- join, flush


def test_actor_join_and_flush_say_so_when_the_queue_is_not_declared(stage: Stage) -> None:
    for call in (stage.company.broker.join, stage.company.broker.flush, stage.company.broker.consume):
        with pytest.raises(QueueNotFound):
            call("nobody's")


def test_actor_join_times_out_when_a_message_is_not_done(stage: Stage) -> None:
    stage.company.note.send("x")
    with pytest.raises(QueueJoinTimeout):
        stage.company.broker.join("default", timeout=200)
    stage.work()
    stage.company.broker.join("default", timeout=int(LIMIT * 1000))
    assert stage.runs("x") == 1


def test_actor_i6_flush_drops_what_waits_when_a_worker_has_it_in_hand(stage: Stage) -> None:
    # Given messages that wait, are delayed, are dead, and one that runs
    company = stage.company
    company.fails.send("dead")
    stage.work(threads=1)
    stage.drained()
    company.waits.send("running", "gate")
    until(lambda: stage.runs("running") == 1, "one runs")
    company.note.send_with_options(args=("delayed",), delay=3_600_000)
    for n in range(5):
        company.note.send(f"n{n}")
    # When the queue is flushed
    company.broker.flush_all()
    stage.open_gate("gate")
    company.note.send("after")
    stage.drained()
    # Then only what came later runs
    assert stage.runs("after") == 1
    assert stage.one("select count(*) from effect where name like 'n%'") == 0
    assert (stage.parked(), stage.one("select count(*) from outbox.receipt")) == ([], 0)


# ------------------------------------------------------------------------------------------------ rights


def test_actor_rights_let_an_application_send_and_not_flush(stage: Stage) -> None:
    with psycopg.connect(stage.urls["app"], autocommit=True) as app:
        stage.company.note.send("x")
        for statement in (
            "select outbox.flush_queue('actor.default')",
            "insert into outbox.consumer values ('actor.default', gen_random_uuid(), '', false, now())",
            "select outbox.declare_queue('index', 1)",
        ):
            with pytest.raises(psycopg.Error, match=r"permission denied|only queues of actors"):
                app.execute(statement.encode())


def test_actor_broker_tells_what_is_missing_when_it_is_used_wrongly(stage: Stage) -> None:
    with pytest.raises(NotReady, match="in an actor"), stage.company.broker.transaction():
        pass
    assert OutboxBroker().session() is None
    with pytest.raises(QueueNotFound):
        stage.company.broker.action(dramatiq.Message("nobody's", "note", (), {}, {}))


def test_actor_import_of_outbox_loads_no_dramatiq() -> None:
    code = "import sys, outbox, outbox.cli; print('dramatiq' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


# ------------------------------------------------------------------------------------------------- sagas


@dataclass
class Order:
    name: str
    fails: bool = False


@pytest.mark.parametrize("fails", [False, True])
def test_actor_i7_step_of_a_saga_is_done_or_failed_as_its_actor_is(stage: Stage, fails: bool) -> None:
    # Given a saga whose first step is undone when the second one, an actor, fails
    company = stage.company
    saga = Saga("order", Order)

    @saga.function
    def reserve(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("insert into payment values (:name)"), {"name": run.input.name})

    @reserve.undo
    def cancel(session: Session, run: Run[Order]) -> None:
        session.execute(sa.text("delete from payment where name = :name"), {"name": run.input.name})

    @saga.intent(kind="pivot", retry=Retry(attempts=1))
    def tell(run: Run[Order]) -> Action:
        return company.broker.action((company.fails if run.input.fails else company.note).message(run.input.name))

    with company.sessions.begin() as session:
        started = saga.start(session, Order("x", fails))
    stage.work()
    # When the engine drives it
    with stage.engine(saga):
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        state = until(lambda: stage.one(ended, started), "the saga ends")
    # Then it ends with its actor's success, or goes back, and nothing is parked
    assert state == ("compensated" if fails else "completed")
    assert stage.payments() == ([] if fails else ["x"])
    assert (stage.parked(), stage.runs("x")) == ([], 3 if fails else 1)


# ------------------------------------------------------------------------------------------------- looks


def test_actor_why_tells_where_a_message_is_when_it_runs_and_when_it_is_done(stage: Stage) -> None:
    stage.company.waits.send("x", "gate")
    stage.work()
    until(lambda: stage.runs("x") == 1, "it runs")
    number = stage.one("select id from outbox.log")
    with psycopg.connect(stage.urls["outbox_worker"], autocommit=True) as conn:
        found = whereabouts.find(conn, number)
        assert (found.state, "in the hands" in found.says) == ("in_hand", True)
        behind = [lane["behind"] for lane in status.read(conn).lanes if lane["target"] == "actor.default"]
        assert sum(behind) == 1
        stage.open_gate("gate")
        stage.drained()
        assert whereabouts.find(conn, number).state == "applied"
