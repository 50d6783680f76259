"""Unique messages: while one of a key is pending, no other is sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import psycopg
import pytest
import sqlalchemy as sa
from dramatiq import Message
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from outbox import Outbox, Saga, decision, whereabouts
from outbox.actor import Duplicate, OutboxBroker
from outbox.errors import IntentRefused
from outbox.saga.run import Action, Run
from tests.fixtures.actors import Company, Stage
from tests.fixtures.site import until
from workers.clock import keep_house


def unique(company: Company, run: Callable[..., Any] | None = None, **options: Any) -> dramatiq.Actor[..., Any]:
    """An actor that leaves a row, unique by its argument unless said otherwise."""
    options = {"unique_key": lambda name: name, "max_retries": 0, **options}
    return dramatiq.actor(broker=company.broker, actor_name=f"unique{len(company.broker.actors)}", **options)(
        run or company._note
    )


@dataclass
class Visit:
    whom: str = "a"


def logged(stage: Stage) -> int:
    return int(stage.one("select count(*) from outbox.log"))


# ------------------------------------------------------------------------------------------- what is sent


def test_unique_second_one_is_not_sent_when_the_first_waits(stage: Stage) -> None:
    # Given a message that waits
    actor = unique(stage.company)
    first = actor.send("a")
    # When it is sent again, and one of another key
    again, other = actor.send("a"), actor.send("b")
    # Then the second one is the first one, and says so
    assert (type(first), type(again), type(other)) == (Message, Duplicate, Message)
    assert (again.message_id, again.args) == (first.message_id, ("a",))
    assert logged(stage) == 2
    # And when it is done, the next one is sent
    stage.work()
    stage.drained()
    assert not isinstance(actor.send("a"), Duplicate)
    stage.drained()
    assert (stage.runs("a"), stage.runs("b")) == (2, 1)


def test_unique_one_is_sent_when_the_first_has_ended_and_not_while_it_runs_or_is_retried(stage: Stage) -> None:
    # Given an actor that waits at a gate, and fails the first time
    company = stage.company

    def run(name: str) -> None:
        company._waits(name, "gate")
        if stage.runs(name) == 1:
            raise RuntimeError("the first time")

    actor = unique(company, run, max_retries=3, min_backoff=3_600_000, max_backoff=3_600_000)
    actor.send("a")
    stage.work()
    until(lambda: stage.runs("a") == 1, "it runs")
    # When it runs, and when it waits for its second try
    assert isinstance(actor.send("a"), Duplicate)
    stage.open_gate("gate")
    until(lambda: [row[0] for row in stage.parked()] == ["retry"], "it waits for the second try")
    # Then nothing is sent
    assert isinstance(actor.send("a"), Duplicate)
    # And when it has succeeded, it is
    stage.admin.execute("update outbox.parked set retry_at = now()")
    stage.drained()
    assert not isinstance(actor.send("a"), Duplicate)
    stage.drained()
    assert (stage.runs("a"), logged(stage)) == (3, 2)


def test_unique_one_is_sent_when_the_first_is_given_up_or_skipped(stage: Stage) -> None:
    # Given a message that is given up, and one that waits for tomorrow and is skipped
    actor = unique(stage.company, stage.company._fails)
    later = unique(stage.company)
    actor.send("a")
    stage.work()
    until(lambda: [row[0] for row in stage.parked()] == ["poison"], "it is given up")
    later.send_with_options(args=("b",), delay=86_400_000)
    until(lambda: len(stage.parked()) == 2, "the other one waits")
    assert isinstance(later.send("b"), Duplicate)
    with psycopg.connect(stage.urls["outbox_operator"], autocommit=True) as operator:
        (number,) = operator.execute("select id from outbox.parked where reason = 'due'").fetchone() or (0,)
        assert decision.decide(operator, "skip", [number])[0].refused is None
    # Then the next ones are sent
    assert not isinstance(actor.send("a"), Duplicate)
    assert not isinstance(later.send("b"), Duplicate)
    # And those of the second are their own
    until(lambda: stage.runs("b") == 1, "it runs")


def test_unique_one_is_sent_when_its_queue_was_flushed(stage: Stage) -> None:
    actor = unique(stage.company)
    actor.send("a")
    stage.company.broker.flush("default")
    assert not isinstance(actor.send("a"), Duplicate)


def test_unique_one_is_sent_when_the_first_was_acknowledged_in_its_own_transaction(stage: Stage) -> None:
    # Given an actor that acknowledges by its transaction, and goes on after that
    company, answers = stage.company, []

    def run(name: str) -> None:
        with company.broker.transaction():
            answers.append(type(actor.send(name)))  # it still runs
        if len(answers) < 3:
            answers.append(type(actor.send(name)))  # it is done

    actor = unique(company, run)
    actor.send("a")
    stage.work()
    # Then it is pending up to the commit, and not after it
    until(lambda: len(answers) == 3, "it has run twice")
    assert answers == [Duplicate, Message, Duplicate]
    stage.drained()


def test_unique_for_one_is_not_sent_when_the_time_is_not_over(stage: Stage) -> None:
    # Given a message that is done, of an actor that is to run once in an hour
    actor = unique(stage.company, unique_for=timedelta(hours=1))
    actor.send("a")
    stage.work()
    stage.drained()
    # When the hour is not over
    assert isinstance(actor.send("a"), Duplicate)
    # Then nothing is sent until it is
    stage.admin.execute("update outbox.unique_message set until = until - interval '1 hour'")
    assert not isinstance(actor.send("a"), Duplicate)
    assert stage.one("select until - now() between interval '50 min' and interval '60 min' from outbox.unique_message")


# ---------------------------------------------------------------------------------------------- whose key


def test_unique_key_is_the_arguments_a_functions_or_the_messages_own_when_it_says_so(stage: Stage) -> None:
    # Given actors with each kind of key, and one without
    everything = unique(stage.company, lambda *args, **kwargs: None, unique_key=True)
    plain = unique(stage.company, lambda *args: None, unique_key="one")
    sometimes = unique(stage.company, lambda *args: None, unique_key=lambda n: f"n{n}" if n else None)
    free = stage.company.note

    def sent(message: Message[Any]) -> bool:
        return not isinstance(message, Duplicate)

    # Then all arguments count, in no order of their names
    assert sent(everything.send(1, x=1, y=2))
    assert not sent(everything.send(1, y=2, x=1))
    assert sent(everything.send(1, y=2, x=3))
    # And a text is the actor's one key, which a message may have its own in place of, or do without
    assert [sent(plain.send(n)) for n in (1, 2)] == [True, False]
    assert [sent(plain.send_with_options(args=(1,), unique_key=key)) for key in ("two", "two", None)] == [
        True, False, True,
    ]  # fmt: skip
    assert [sent(sometimes.send(n)) for n in (0, 0, 1, 1)] == [True, True, True, False]
    # And what has a key for one message only, has it; another actor's keys are others
    assert [sent(free.send_with_options(args=("x",), unique_key="one")) for _ in range(2)] == [True, False]
    assert sent(free.send("x"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unique_key": 7}, "not text, a function"),
        ({"unique_key": ""}, "not text, a function"),
        ({"unique_for": 1000}, "no unique_key"),
        ({"unique_key": "k", "unique_for": 0}, "number of milliseconds"),
        ({"unique_key": "k", "unique_for": "1h"}, "number of milliseconds"),
        ({"unique_key": "k", "unique_for": timedelta(days=4000)}, "number of milliseconds"),
    ],
)
def test_unique_options_are_refused_when_an_actor_is_declared(options: dict[str, Any], sentence: str) -> None:
    broker = OutboxBroker()
    with pytest.raises(ValueError, match=sentence):
        dramatiq.actor(broker=broker, **options)(lambda: None)
    assert broker.actors == {}


@pytest.mark.parametrize(
    "options", [{"unique_key": 7}, {"unique_key": "k" * 513}, {"unique_key": "k", "unique_for": -1}]
)
def test_unique_options_are_refused_when_a_message_is_sent(stage: Stage, options: dict[str, Any]) -> None:
    with stage.company.sessions.begin(), pytest.raises(IntentRefused):
        stage.company.note.send_with_options(args=("x",), **options)
    with pytest.raises(IntentRefused, match="group"):
        stage.company.note.send_with_options(args=("x",), unique_key="k", group_completion_uuid="u")
    assert logged(stage) == 0


# ------------------------------------------------------------------------------------------- transactions


def test_unique_i1_key_is_free_when_the_sender_rolls_back(stage: Stage) -> None:
    # Given an application that sends in transactions and savepoints
    actor, sessions = unique(stage.company), stage.company.sessions
    with pytest.raises(ZeroDivisionError), sessions.begin():
        actor.send("a")
        raise ZeroDivisionError
    with sessions.begin() as session:
        with session.begin_nested() as savepoint:
            assert not isinstance(actor.send("a"), Duplicate)
            savepoint.rollback()
        # When those are rolled back, then the key is free
        first = actor.send("a")
        assert not isinstance(first, Duplicate)
        # And in one transaction, the second one is the first
        with session.begin_nested():
            again = actor.send("a")
        assert isinstance(again, Duplicate)
        assert again.message_id == first.message_id
    assert [row[0] for row in stage.admin.execute("select key from outbox.log")] == [first.message_id]


def test_unique_i4_intents_stay_in_order_and_have_a_token_when_one_is_unique(stage: Stage) -> None:
    # Given a transaction that sends a plain message, a unique one, and a plain one
    actor, company = unique(stage.company), stage.company
    with company.sessions.begin() as session:
        sent = [company.note.send("1"), actor.send("2"), company.note.send("3")]
    # Then they lie in the log as they were sent
    assert [row[0] for row in stage.admin.execute("select key from outbox.log order by id")] == [
        message.message_id for message in sent
    ]
    # And a transaction with a unique one alone can be waited for
    with company.sessions.begin() as session:
        actor.send("4")
    token = company.outbox.token(session)
    assert token is not None
    stage.work()
    with company.sessions() as reader:
        company.outbox.wait(reader, token, "actor.default", timeout=90)
    assert stage.runs("4") == 1


def test_unique_i4_message_waits_its_turn_when_it_has_an_ordering_key_too(stage: Stage) -> None:
    # Given an actor whose messages are unique by their arguments, and run in order
    actor = unique(stage.company, unique_key=True, ordering_key="line")
    with stage.company.sessions.begin():
        sent = [actor.send(name) for name in ("a", "b", "a", "c")]
    # Then what is sent of them is in the line
    assert [type(message) for message in sent] == [Message, Message, Duplicate, Message]
    rows = stage.admin.execute("select action, key, payload #>> '{args,0}' from outbox.log order by id").fetchall()
    assert rows == [("send.ordered", "line", name) for name in ("a", "b", "c")]
    stage.work()
    stage.drained()
    assert [row[0] for row in stage.admin.execute("select name from effect order by at")] == ["a", "b", "c"]


def test_unique_one_of_two_senders_wins_when_both_send_at_once(stage: Stage) -> None:
    # Given a transaction that has sent, and not ended
    actor, sessions = unique(stage.company), stage.company.sessions
    waits = "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    for commits in (True, False):
        name = f"commits {commits}"
        found: list[Message[Any]] = []

        def second(name: str = name, found: list[Message[Any]] = found) -> None:
            with sessions.begin():
                found.append(actor.send(name))

        with sessions() as session:
            session.begin()
            first = actor.send(name)
            # When another one sends the same
            thread = threading.Thread(target=second)
            thread.start()
            until(lambda: stage.one(waits), "it waits")
            (session.commit if commits else session.rollback)()
        thread.join()
        # Then it has waited for the first one's end, and knows
        assert isinstance(found[0], Duplicate) == commits
        assert (found[0].message_id == first.message_id) == commits
    assert logged(stage) == 2


def test_unique_nobody_waits_when_the_one_that_is_there_is_committed(stage: Stage) -> None:
    # Given a committed message, and a transaction that has found it
    actor, sessions = unique(stage.company), stage.company.sessions
    actor.send("a")
    with sessions.begin():
        assert isinstance(actor.send("a"), Duplicate)
        # When another one sends the same, then it doesn't wait for that transaction
        with psycopg.connect(stage.urls["app"]) as other:
            other.execute("set lock_timeout = '1ms'")
            payload = stage.one("select payload::text from outbox.log")
            row = other.execute(
                "select sent from outbox.send_unique('actor.default', 'send', 'k', %s::jsonb, null, null)", (payload,)
            ).fetchone()
            assert row == (False,)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_unique_sender_is_told_to_try_again_when_its_snapshot_is_older_than_the_other_one(
    stage: Stage, level: str
) -> None:
    # Given a transaction with a snapshot, and a message that was sent after it was taken
    actor, company = unique(stage.company), stage.company
    with company.sessions() as session:
        session.connection(execution_options={"isolation_level": level})
        session.execute(sa.text("select 1"))
        thread = threading.Thread(target=actor.send, args=("a",))  # in no transaction of ours
        thread.start()
        thread.join()
        # When it sends the same, then it can't know, and says so as Postgres does
        with pytest.raises(sa.exc.OperationalError) as caught:
            actor.send("a")
        assert getattr(caught.value.orig, "sqlstate", None) == "40001"
    # And the next try knows
    with company.sessions() as session:
        session.connection(execution_options={"isolation_level": level})
        assert isinstance(actor.send("a"), Duplicate)
        assert not isinstance(actor.send("b"), Duplicate)
        assert isinstance(actor.send("b"), Duplicate)
        session.commit()
    assert logged(stage) == 2


def test_unique_send_is_refused_in_an_async_session_and_goes_through_run_sync(stage: Stage) -> None:
    # Given an application with AsyncSession
    engine = create_async_engine(stage.app.sqlalchemy_url)
    sessions = async_sessionmaker(engine)
    outbox = Outbox(sessions.kw.get("sync_session_class") or AsyncSession.sync_session_class, stage.app)
    broker = OutboxBroker(outbox, settings=stage.app)
    actor = dramatiq.actor(broker=broker, actor_name="async", unique_key=True)(stage.company._note)

    async def send() -> list[type]:
        async with sessions.begin() as session:
            await session.execute(sa.text("select 1"))
            with pytest.raises(IntentRefused, match="run_sync"):
                actor.send("a")
            return [type(await session.run_sync(lambda _: actor.send("a"))) for _ in range(2)]

    async def main() -> list[type]:
        try:
            return await send()
        finally:
            await engine.dispose()

    assert asyncio.run(main()) == [Message, Duplicate]
    assert logged(stage) == 1
    broker.close()


# ------------------------------------------------------------------------------------- operators, sagas


def test_unique_dead_letter_is_not_retried_when_another_of_its_key_is_pending(
    stage: Stage, operator: psycopg.Connection[Any]
) -> None:
    # Given a message that was given up, and the next one of its key, which waits
    company, fail = stage.company, [True]

    def run(name: str) -> None:
        company.ran(name)
        if fail:
            raise RuntimeError(name)

    actor = unique(company, run)
    actor.send("a")
    worker = stage.work()
    until(lambda: [row[0] for row in stage.parked()] == ["poison"], "it is given up")
    (dead,) = operator.execute("select id from outbox.parked").fetchone() or (0,)
    second = actor.send_with_options(args=("a",), delay=3_600_000)
    assert not isinstance(second, Duplicate)
    # When an operator wants the first one to be tried again
    refused = decision.decide(operator, "retry", [dead])[0].refused
    # Then it is refused, with the one that is pending; `why` says so too
    number = stage.one("select id from outbox.log where key = %s", second.message_id)
    assert refused is not None
    assert f"intent {number} has the same unique key" in refused
    assert f"Intent {number} has the same unique key" in whereabouts.find(operator, dead).says
    assert "no other message" in whereabouts.find(operator, number).says
    # And when that is done, it is tried, and has its key again
    until(lambda: len(stage.parked()) == 2, "the second one is parked until its time")
    fail.clear()
    stage.admin.execute("update outbox.parked set retry_at = now() where reason = 'due'")
    stage.drained()
    worker.pause()
    assert decision.decide(operator, "retry", [dead])[0].refused is None
    third = actor.send("a")
    assert isinstance(third, Duplicate)
    assert third.message_id == stage.one("select key from outbox.log where id = %s", dead)
    worker.resume()
    stage.drained()
    assert (stage.runs("a"), stage.parked()) == (3, [])


def test_unique_dead_letters_are_retried_one_at_a_time_when_an_operator_retries_them_all(
    stage: Stage, operator: psycopg.Connection[Any]
) -> None:
    # Given three dead letters of one key
    actor = unique(stage.company, stage.company._fails)
    stage.work()
    for n in range(3):
        actor.send("a")
        until(lambda n=n: [row[0] for row in stage.parked()] == ["poison"] * (n + 1), "it is given up")  # type: ignore[misc]
    ids = [row[0] for row in operator.execute("select id from outbox.parked order by id")]
    # When all are retried in one transaction
    with operator.transaction():
        decided = decision.decide(operator, "retry", ids)
        # Then the first one is, and the others are told why not
        assert [one.refused is None for one in decided] == [True, False, False]


def test_unique_message_is_refused_when_a_saga_would_wait_for_it(stage: Stage) -> None:
    # Given a saga with a step that is a unique message, and one that isn't for this time
    company = stage.company
    actor = unique(company)
    errors: list[str] = []
    saga = Saga("visit", Visit)

    @saga.intent(kind="pivot")
    def run(run: Run[Visit]) -> Action:
        try:
            company.broker.action(actor.message("a"))
        except IntentRefused as error:
            errors.append(str(error))
        return company.broker.action(actor.message_with_options(args=("a",), unique_key=None))

    with stage.engine(saga):
        with company.sessions.begin() as session:
            saga.start(session, Visit())
        stage.work()
        until(lambda: stage.one("select state from outbox.saga") == "completed", "it is done")
    assert stage.runs("a") == 1
    assert "unique_key=None" in errors[0]


# ------------------------------------------------------------------------------------------ housekeeping


def test_unique_keys_are_forgotten_when_their_messages_are_done(stage: Stage, worker: psycopg.Connection[Any]) -> None:
    # Given keys of messages that are done, and one of a message that waits, one whose time is not over
    actor = unique(stage.company)
    for n in range(20):
        actor.send(f"k{n}")
    actor.send_with_options(args=("waits",), delay=86_400_000)
    actor.send_with_options(args=("hour",), unique_for=3_600_000)
    # (not looked at by the clock that runs here, however long this takes)
    stage.admin.execute("update outbox.unique_message set look_at = now() + interval '30 min'")
    stage.work()
    until(lambda: stage.one("select count(*) from effect") == 21, "all but one are done")
    pending = "select count(*) from outbox.unique_message where outbox.is_pending(id)"
    until(lambda: stage.one(pending) == 1, "and that is written down")
    # When the house is kept half an hour later, in small groups
    later = datetime.now(UTC) + timedelta(minutes=40)
    worker.execute("select set_config('outbox.fake_now', %s, false)", (later.isoformat(),))
    assert worker.execute("select outbox.forget_unique(7)").fetchone() == (7,)
    keep_house(worker, None)
    # Then only those are left
    left = [row[0] for row in stage.admin.execute("select key from outbox.unique_message order by key")]
    assert left == ["hour", "waits"]
    # And nobody looks at them again at once
    assert worker.execute("select outbox.forget_unique()").fetchone() == (0,)
    assert isinstance(actor.send("waits"), Duplicate)
    assert isinstance(actor.send("hour"), Duplicate)
    assert not isinstance(actor.send("k0"), Duplicate)


def test_unique_key_is_known_when_its_partition_is_gone(stage: Stage) -> None:
    # Given a key that is taken for a day, of a message whose part of the log was dropped
    actor = unique(stage.company, unique_for=timedelta(days=1))
    actor.send("a")
    actor.send("b")
    stage.work()
    stage.drained()
    with stage.admin.transaction():
        stage.admin.execute("set local session_replication_role = replica")
        stage.admin.execute("delete from outbox.log")
    stage.admin.execute("update outbox.unique_message set until = now() where key = 'b'")
    # Then the day counts all the same, and nothing else does
    assert isinstance(actor.send("a"), Duplicate)
    assert not isinstance(actor.send("b"), Duplicate)
