"""Messages that end without their actor, or after its own commit: whoever waits for a result is told."""

from __future__ import annotations

from typing import Any

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.results import ResultFailure, ResultMissing, Results

from outbox.actor import OutboxResults, bell
from outbox.decision import decide
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until
from tests.integration.test_actor_async import Shop, shop  # noqa: F401 - a fixture

WAIT = int(LIMIT * 1000)

DAY = 24 * 3600 * 1000

_WITH_PARKED = "select exists (select from outbox.parked p join outbox.result r on r.xmin = p.xmin)"


def _parks(stage: Stage, *messages: dramatiq.Message[Any]) -> list[int]:
    """Send messages that are not due for a day, and have them parked. → their intents."""
    for message in messages:
        stage.company.broker.enqueue(message, delay=DAY)
    until(lambda: len(stage.parked()) == len(messages), "they are parked")
    return [row[0] for row in stage.admin.execute("select id from outbox.parked order by id")]


def test_results_i3_failure_is_stored_by_the_commit_that_gives_up_a_message_that_killed_its_workers(
    stage: Stage,
) -> None:
    # Given a message whose workers have died of it, and somebody who doesn't look by himself
    stage.work()
    message = stage.company.tells.message("a")
    (number,) = _parks(stage, message)
    # When a worker looks at it
    stage.admin.execute(
        "update outbox.parked set reason = 'retry', deaths = 3, alone = true, retry_at = now() where id = %s", (number,)
    )
    # Then whoever waits is told why
    with pytest.raises(ResultFailure, match=rf"MessageAbandoned: intent {number} was in hand when its worker died"):
        stage.company.results.get_result(message, block=True, timeout=WAIT)
    # And that was stored with its being given up
    assert [reason for reason, _, _ in stage.parked()] == ["poison"]
    assert stage.one(_WITH_PARKED)


def test_results_i2_failure_is_stored_when_an_operator_skips_a_message(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a message that waits for its time
    monkeypatch.setattr(bell, "LOOK_EVERY", 10 * LIMIT)
    worker = stage.work()
    message = stage.company.tells.message("a")
    (number,) = _parks(stage, message)
    # When an operator skips it while a worker is there
    assert [one.refused for one in decide(stage.admin, "skip", [number])] == [None]
    # Then whoever waits is told, with the row that says that it was done
    with pytest.raises(ResultFailure, match=f"MessageAbandoned: intent {number} was skipped by an operator"):
        stage.company.results.get_result(message, block=True, timeout=WAIT)
    assert stage.one(_WITH_PARKED)
    assert stage.one("select count(*) from outbox.parked where untold") == 0
    # And when another one is skipped while there is none, the next worker tells
    later = stage.company.tells.message("b")
    stage.company.broker.enqueue(later, delay=DAY)
    until(lambda: len(stage.parked()) == 2, "it is parked")
    stage.forget(worker)
    worker.stop()
    decide(stage.admin, "skip", [stage.one("select id from outbox.parked where reason = 'due'")])
    with pytest.raises(ResultMissing):
        stage.company.results.get_result(later)
    stage.work()
    with pytest.raises(ResultFailure, match="was skipped by an operator"):
        stage.company.results.get_result(later, block=True, timeout=WAIT)


def test_results_of_skipped_messages_are_stored_for_those_alone_that_have_one(stage: Stage) -> None:
    # Given one that has failed, one without results, one that is no message, one of nobody here, and one with results
    company = stage.company

    @dramatiq.actor(broker=company.broker, store_results=True, max_retries=0)
    def breaks() -> None:
        raise RuntimeError("the reason")

    stage.work()
    failed, last = breaks.send(), company.tells.message("last")
    with pytest.raises(ResultFailure, match="the reason"):
        company.results.get_result(failed, block=True, timeout=WAIT)
    foreign: dramatiq.Message[Any] = dramatiq.Message("default", "nobody", (), {}, {"store_results": True})
    without = company.note.message("without")
    for message in (without, foreign):
        company.broker.enqueue(message, delay=DAY)
    stage.admin.execute(
        "insert into outbox.log (target, action, key, payload, due)"
        " values ('actor.default', 'send', 'k', '{}', now() + interval '1 day')"
    )
    company.broker.enqueue(last, delay=DAY)
    until(lambda: len(stage.parked()) == 5, "they are parked")
    # When all of them are skipped
    ids = [row[0] for row in stage.admin.execute("select id from outbox.parked order by id")]
    assert [one.refused for one in decide(stage.admin, "skip", ids)] == [None] * 5
    until(lambda: stage.one("select count(*) from outbox.parked where untold") == 0, "nobody is left to be told")
    # Then the last one has a failure, the first one its own, and there are no others
    with pytest.raises(ResultFailure, match="was skipped by an operator"):
        company.results.get_result(last)
    with pytest.raises(ResultFailure, match="the reason"):
        company.results.get_result(failed)
    assert stage.one("select count(*) from outbox.result") == 2
    # And the worker goes on
    assert company.tells.send("a").get_result(backend=company.results, block=True, timeout=WAIT) == "result of a"


@pytest.mark.parametrize("retries", [0, 3])
def test_results_failure_is_stored_when_an_actor_fails_after_its_own_commit(stage: Stage, retries: int) -> None:
    # Given an actor that pays, and fails after that
    company = stage.company

    @dramatiq.actor(broker=company.broker, store_results=True, max_retries=retries, min_backoff=50, max_backoff=50)
    def pays_and_fails() -> None:
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values ('once')"))
        raise RuntimeError("after it")

    stage.work()
    # When it has run
    message = pays_and_fails.send()
    # Then whoever waits hears of it at once, it is not tried again, and nobody has to decide about it
    with pytest.raises(ResultFailure, match="RuntimeError: after it"):
        company.results.get_result(message, block=True, timeout=WAIT)
    stage.drained()
    assert (stage.payments(), stage.parked()) == (["once"], [])


def test_results_what_is_returned_after_the_actors_own_commit_is_stored(stage: Stage) -> None:
    # Given an actor that says nothing in its transaction, and returns something after it
    company = stage.company

    @dramatiq.actor(broker=company.broker, store_results=True)
    def pays_and_returns() -> str:
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values ('once')"))
        return "paid"

    stage.work()
    # When it has run, then
    assert pays_and_returns.send().get_result(backend=company.results, block=True, timeout=WAIT) == "paid"


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_results_i3_what_was_said_in_a_transaction_that_was_rolled_back_is_forgotten(stage: Stage, ends: str) -> None:
    # Given an actor whose transaction fails, and that goes on without it
    company = stage.company

    @dramatiq.actor(broker=company.broker, store_results=True, max_retries=0)
    def tries() -> str:
        try:
            with company.broker.transaction() as session:
                session.execute(sa.text("insert into payment values ('never')"))
                company.broker.result("of what was rolled back")
                raise RuntimeError("in the transaction")
        except RuntimeError:
            if ends == "badly":
                raise
        return "without it"

    stage.work()
    # When it has run
    message = tries.send()
    # Then its result is what it returned, or that it failed
    if ends == "well":
        assert company.results.get_result(message, block=True, timeout=WAIT) == "without it"
    else:
        with pytest.raises(ResultFailure, match="in the transaction"):
            company.results.get_result(message, block=True, timeout=WAIT)
    assert stage.payments() == []


def test_results_i3_what_was_said_in_an_async_transaction_that_was_rolled_back_is_forgotten(
    stage: Stage,
    shop: Shop,  # noqa: F811
) -> None:
    # Given an async actor whose transaction fails, and that goes on without it
    results = OutboxResults(shop.broker)
    shop.broker.add_middleware(Results(backend=results))

    async def tries() -> str:
        try:
            async with shop.broker.atransaction():
                shop.broker.result("of what was rolled back")
                raise RuntimeError("in the transaction")
        except RuntimeError:
            return "without it"

    message = shop.actor(tries, "tries", store_results=True).send()
    # When it has run
    stage.work_for(shop.broker)
    # Then its result is what it returned
    assert results.get_result(message, block=True, timeout=WAIT) == "without it"


def test_results_i3_second_transaction_of_an_actor_that_is_rolled_back_leaves_the_first_ones_result(
    stage: Stage,
) -> None:
    # Given an actor that has acknowledged its message already, and says something in a second transaction
    company = stage.company

    @dramatiq.actor(broker=company.broker, store_results=True, max_retries=0)
    def twice() -> None:
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values ('first')"))
        with company.broker.transaction() as session:
            session.execute(sa.text("insert into payment values ('second')"))
            company.broker.result("of the second")

    stage.work()
    # When it has run
    message = twice.send()
    # Then the second is refused, and counts for nothing
    with pytest.raises(ResultFailure, match="Fenced"):
        company.results.get_result(message, block=True, timeout=WAIT)
    assert stage.payments() == ["first"]


@pytest.mark.parametrize("ttl", ["soon", -1, 1e300, True])
def test_results_i10_worker_goes_on_when_a_messages_result_ttl_is_nonsense(stage: Stage, ttl: object) -> None:
    # Given a message with a time that nothing can be kept for
    company = stage.company
    stage.work()
    company.tells.send_with_options(args=("a",), result_ttl=ttl)
    # When it has run, then it has no result, is done, and others follow
    until(lambda: stage.runs("a") == 1, "it runs")
    assert company.tells.send("b").get_result(backend=company.results, block=True, timeout=WAIT) == "result of b"
    stage.drained()
    assert (stage.runs("a"), stage.parked()) == (1, [])
    assert stage.one("select count(*) from outbox.result") == 1
