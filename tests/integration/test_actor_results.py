"""Results of actors: there with the acknowledgement, waited for without hammering, gone when their time is over."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from typing import Any

import dramatiq
import psycopg
import pytest
import sqlalchemy as sa
from dramatiq.encoder import PickleEncoder
from dramatiq.results import ResultFailure, ResultMissing, ResultTimeout

from outbox.actor import OutboxResults, bell
from outbox.actor.results import RESULT_LIMIT
from outbox.database import connect
from outbox.errors import PayloadInvalid, PayloadTooLarge
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until
from workers import clock

WAIT = int(LIMIT * 1000)

# Which of the positions of a queue, or of what is parked, was written by the transaction that stored a result.
_WITH_POSITION = "select exists (select from outbox.position p join outbox.result r on r.xmin = p.xmin)"
_WITH_PARKED = "select exists (select from outbox.parked p join outbox.result r on r.xmin = p.xmin)"


def test_results_i3_result_is_stored_by_the_commit_that_acknowledges_when_an_actor_returns(stage: Stage) -> None:
    # Given a worker
    stage.work()
    # When a message is sent whose actor returns something
    message = stage.company.tells.send("a")
    # Then whoever waits for its result gets it
    assert message.get_result(backend=stage.company.results, block=True, timeout=WAIT) == "result of a"
    # And it came into being with the acknowledgement
    stage.drained()
    assert stage.one(_WITH_POSITION)
    # And it can be asked for again, until somebody takes it away
    assert stage.company.results.get_result(message) == "result of a"
    assert stage.company.results.get_result(message, forget=True) == "result of a"
    with pytest.raises(ResultMissing):
        stage.company.results.get_result(message)


def test_results_i3_failure_is_stored_by_the_commit_that_parks_when_a_message_is_given_up(stage: Stage) -> None:
    # Given an actor that stores results, and fails, with a retry
    @dramatiq.actor(broker=stage.company.broker, store_results=True, max_retries=1, min_backoff=50, max_backoff=50)
    def breaks() -> None:
        raise RuntimeError("the reason")

    # And something that hears of its end before dramatiq's Results, and takes longer than it takes to write it down
    class Slow(dramatiq.Middleware):
        def after_nack(self, _broker: dramatiq.Broker, _message: dramatiq.MessageProxy) -> None:
            until(stage.parked, "it is parked")
            until(lambda: stage.one("select count(*) from outbox.parked where reason = 'poison'"), "it is given up")

    stage.company.broker.add_middleware(Slow())
    stage.work()
    # When its message is given up
    message = breaks.send()
    # Then whoever waits for the result is told why
    with pytest.raises(ResultFailure, match="actor raised RuntimeError: the reason"):
        message.get_result(backend=stage.company.results, block=True, timeout=WAIT)
    # And that was stored with the message's being parked
    assert [reason for reason, _, _ in stage.parked()] == ["poison"]
    assert stage.one(_WITH_PARKED)


def test_results_failure_is_replaced_when_an_operator_has_the_message_tried_again(stage: Stage) -> None:
    # Given a message that was given up
    broken = [True]

    @dramatiq.actor(broker=stage.company.broker, store_results=True, max_retries=0)
    def mended() -> str:
        if broken:
            raise RuntimeError("for now")
        return "well"

    stage.work()
    message = mended.send()
    until(lambda: [reason for reason, _, _ in stage.parked()] == ["poison"], "it is given up")
    # When what was wrong with it is mended, and an operator has it tried again
    broken.clear()
    stage.admin.execute("update outbox.parked set reason = 'retry', retry_at = outbox.now()")
    stage.drained()
    # Then its result is what it returned
    assert stage.company.results.get_result(message) == "well"
    assert stage.one("select count(*) from outbox.receipt") == 0


@pytest.mark.parametrize("value", [float("nan"), 1e300, -0.0, "\x00ä\ud800", {"a": [None, True, 10**30]}])
def test_results_come_back_as_they_were_when_they_are_json(stage: Stage, value: object) -> None:
    # Given what dramatiq's JSON encoder writes, and jsonb would change or refuse
    message = stage.company.tells.message("a")
    # When it is stored, and got
    stage.company.results.store_result(message, value, 60_000)
    # Then it is the same
    assert repr(stage.company.results.get_result(message)) == repr(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [({1, 2}, "the result is not JSON"), ("x" * RESULT_LIMIT, "put it as a blob")],
    ids=["set", "large"],
)
def test_results_that_cannot_be_stored_are_failures_when_somebody_waits_for_them(
    stage: Stage, value: object, why: str
) -> None:
    # Given an actor that returns what is no result
    runs = []

    @dramatiq.actor(broker=stage.company.broker, store_results=True)
    def returns() -> object:
        runs.append(1)
        return value

    stage.work()
    # When it has run
    message = returns.send()
    # Then whoever waits is told at once, and the message is done: it would not get any better
    with pytest.raises(ResultFailure, match=why):
        message.get_result(backend=stage.company.results, block=True, timeout=WAIT)
    stage.drained()
    assert (runs, stage.parked()) == ([1], [])
    # And an application that stores such a thing itself is refused
    with pytest.raises((PayloadInvalid, PayloadTooLarge), match=why):
        stage.company.results.store_result(message, value, 60_000)


def test_results_are_refused_when_they_would_be_pickled(stage: Stage) -> None:
    with pytest.raises(PayloadInvalid, match=r"use dramatiq\.JSONEncoder"):
        OutboxResults(stage.company.broker, encoder=PickleEncoder())


# ------------------------------------------------------------------------------------------- exactly once


def test_results_i3_result_is_rolled_back_with_the_actors_transaction_when_that_fails(stage: Stage) -> None:
    # Given an actor that fails in its transaction the first time
    company = stage.company
    seen: list[Any] = []

    @dramatiq.actor(broker=company.broker, store_results=True, min_backoff=50, max_backoff=50)
    def tries() -> str:
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values ('once')"))
            company.broker.result(f"try {len(seen)}")
            if not seen:
                with connect(stage.app.database, name="test") as conn:
                    seen.append(conn.execute("select count(*) from outbox.result").fetchone())
                raise RuntimeError("the first time")
        return "after it"

    stage.work()
    # When its message has come through
    message = tries.send()
    stage.drained()
    # Then there are the payment and the result of the try that committed, and what came after counts for nothing
    assert stage.payments() == ["once"]
    assert seen == [(0,)]
    assert company.results.get_result(message) == "try 1"


def test_results_i3_result_is_there_when_the_worker_is_killed_right_after_the_actors_commit(stage: Stage) -> None:
    # Given an actor that is killed after its transaction has committed, before anything else is written down
    message = stage.company.owes.send("debt", dies=True)
    process = stage.start()
    assert process.wait(LIMIT) == -signal.SIGKILL
    # When another worker comes
    stage.start()
    stage.drained()
    # Then the actor has run once, and payment and result are there
    assert (stage.runs("debt"), stage.payments()) == (1, ["debt"])
    assert stage.company.results.get_result(message, block=True, timeout=WAIT) == "result of debt"


def test_results_i3_result_said_in_the_transaction_wakes_who_waits_when_it_has_committed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given somebody who waits, and doesn't look by himself
    monkeypatch.setattr(bell, "LOOK_EVERY", 10 * LIMIT)
    stage.work()
    # When the result is stored by the actor's own transaction
    message = stage.company.owes.send("debt", dies=False)
    # Then he is woken, and gets that one
    assert stage.company.results.get_result(message, block=True, timeout=WAIT) == "result of debt"
    stage.drained()
    assert stage.company.results.get_result(message) == "result of debt"


def test_results_i6_nothing_is_stored_when_the_message_is_in_other_hands(stage: Stage) -> None:
    # Given an actor that runs while its queue is flushed
    company, runs = stage.company, threading.Event()
    goes_on = threading.Event()

    @dramatiq.actor(broker=company.broker, store_results=True)
    def slow() -> str:
        runs.set()
        assert goes_on.wait(LIMIT)
        return "too late"

    stage.work()
    message = slow.send()
    assert runs.wait(LIMIT)
    company.broker.flush("default")
    # When it ends, and the next message after it is done
    goes_on.set()
    assert company.tells.send("next").get_result(backend=company.results, block=True, timeout=WAIT)
    # Then its result is nobody's
    with pytest.raises(ResultMissing):
        company.results.get_result(message)


# ---------------------------------------------------------------------------------------------- waiting


def test_results_who_waits_is_woken_and_looks_seldom(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given somebody who waits, and would look by himself only after all our patience
    monkeypatch.setattr(bell, "LOOK_EVERY", 10 * LIMIT)
    looks: list[float] = []
    found: list[Any] = []
    results, message = stage.company.results, stage.company.tells.message("a")
    key = results.build_message_key(message)

    def wait() -> None:
        with connect(stage.app.database, name="waits") as conn:

            def look() -> object:
                looks.append(time.monotonic())
                return conn.execute("select value from outbox.result where key = %s", (key,)).fetchone()

            found.append(bell.wait(conn, key, look, LIMIT))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: len(looks) == 2, "it listens")
    # When results of others are stored, which ring other bells, and then its own
    others = [stage.company.tells.message(f"other {n}") for n in range(20)]
    bells = {results.build_message_key(other): other for other in others}
    for other in (other for name, other in bells.items() if bell.channel(name) != bell.channel(key)):
        results.store_result(other, "another one", 60_000)
    assert len(looks) == 2
    results.store_result(message, 1, 60_000)
    thread.join(LIMIT)
    # Then it has looked three times in all
    assert found == [("1",)]
    assert len(looks) == 3


def test_results_waiting_ends_when_its_time_is_over(stage: Stage) -> None:
    begun = time.monotonic()
    with pytest.raises(ResultTimeout):
        stage.company.results.get_result(stage.company.tells.message("never"), block=True, timeout=300)
    assert time.monotonic() - begun >= 0.3


def test_results_waiting_goes_on_when_the_connection_is_lost(stage: Stage) -> None:
    # Given somebody who waits for a result
    message = stage.company.tells.message("a")
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(stage.company.results.get_result(message, block=True, timeout=WAIT))
    )
    thread.start()
    waiting = (
        "select pid from pg_stat_activity "
        "where query like '%%from outbox.result where key%%' and datname = %s and pid <> pg_backend_pid()"
    )
    pid = until(partial(stage.one, waiting, stage.admin.info.dbname), "it waits")
    # When his connection is cut, and the result is stored after that
    stage.admin.execute("select pg_terminate_backend(%s)", (pid,))
    stage.company.results.store_result(message, "there", 60_000)
    # Then he has it
    thread.join(LIMIT)
    assert found == ["there"]


# ------------------------------------------------------------------------------------------- running out


def test_results_run_out_by_the_databases_clock_and_are_removed_in_groups(
    stage: Stage, worker: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given results of ten minutes and one of a day, and a number of a rate limiter
    results, limits = stage.company.results, stage.company.limits
    messages = [stage.company.tells.message(f"m{n}") for n in range(7)]
    for message in messages:
        results.store_result(message, "short", 600_000)
    lasting = stage.company.tells.message("lasting")
    results.store_result(lasting, "long", 24 * 3600 * 1000)
    assert limits.add("short", 1, 600_000)
    assert limits.add("long", 1, 24 * 3600 * 1000)
    # When an hour goes by
    stage.later(3600)
    # Then the short ones count as gone
    with pytest.raises(ResultMissing):
        results.get_result(messages[0])
    assert limits.add("short", 1, 600_000)
    assert not limits.add("long", 1, 600_000)
    stage.later(3600)
    # And housekeeping removes them, two at a time
    monkeypatch.setattr(clock, "EXPIRE_PAGE", 2)
    clock.expire(worker)
    assert stage.one("select count(*) from outbox.result") == 1
    assert stage.one("select string_agg(key, ' ') from outbox.tally") == "long"
    assert results.get_result(lasting) == "long"
