"""What a worker has in mind and has not written down, when its lane or a row of its own turns out to be another's."""

from __future__ import annotations

from functools import partial
from uuid import uuid4

import psycopg
import pytest
from dramatiq.results import ResultFailure, ResultMissing

from outbox.actor.letter import intent_of
from tests.fixtures.actors import Company, Stage
from tests.fixtures.site import LIMIT, until
from workers.actor import delivery

NEVER = 1e6
"""Seconds: nothing is written that need not be."""

TAKE_AWAY = (
    "update outbox.lane set epoch = epoch + 1, owner = null, place = null, lease_until = null"
    " where target = 'actor.default'"
)


def _ended(company: Company) -> bool:
    """Whether its worker knows what became of all that it had in hand."""
    made = company.broker._delivery
    return not (made._estate.claimed or made._estate.out or made._settled)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_actor_i2_i3_what_became_of_messages_is_written_down_when_their_lane_is_given_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    # Given a worker that hasn't yet written down that a message is done, or has failed for good
    worker = stage.work()
    stage.drained()
    monkeypatch.setattr(delivery, "WRITE_EVERY", NEVER)
    verdict = "fails" if ends == "badly" else ""
    message = stage.company.waits.message_with_options(args=("x", "gate", verdict), max_retries=0, store_results=True)
    stage.company.broker.enqueue(message)
    until(lambda: stage.runs("x") == 1, "it runs")
    stage.open_gate("gate")
    until(partial(_ended, stage.company), "it has ended, and is to be written down")
    assert stage.parked() == []
    # When it gives its lanes back
    stage.forget(worker)
    worker.stop()
    # Then all of that is there, and the next worker has nothing to do
    if ends == "badly":
        assert [reason for reason, _, _ in stage.parked()] == ["poison"]
        with pytest.raises(ResultFailure, match="RuntimeError"):
            stage.company.results.get_result(message)
    else:
        assert stage.company.results.get_result(message) is None
    stage.work(stage.another())
    stage.drained()
    assert stage.runs("x") == 1


def test_actor_i6_nothing_that_became_of_a_message_is_written_down_when_its_lane_is_anothers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that hasn't yet written down that a message has failed for good
    stage.work()
    stage.drained()
    monkeypatch.setattr(delivery, "WRITE_EVERY", NEVER)
    stage.company.waits.send_with_options(args=("x", "gate", "fails"), max_retries=0, store_results=True)
    until(lambda: stage.runs("x") == 1, "it runs")
    stage.open_gate("gate")
    until(partial(_ended, stage.company), "it has ended, and is to be written down")
    # When its lane is taken away, and it writes
    stage.admin.execute(TAKE_AWAY)
    monkeypatch.setattr(delivery, "WRITE_EVERY", 0.0)
    # Then nobody has given the message up: whoever has the lane now runs it again
    until(lambda: stage.runs("x") == 2, "it runs again")
    stage.drained()
    assert [(reason, attempts) for reason, attempts, _ in stage.parked()] == [("poison", 1)]


def test_actor_i6_message_is_not_begun_when_its_lane_was_found_to_be_anothers(stage: Stage) -> None:
    # Given a worker whose one thread is taken, with one more in dramatiq's hands
    worker = stage.work(stage.another(lanes=1), threads=1)
    company = stage._companies[-1]
    company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    company.note.send("fetched")
    until(lambda: worker.work_queue.qsize() == 1, "one more was fetched")
    # When somebody else has the lane, and the worker finds that out, long before its lease is over
    stage.admin.execute(
        "update outbox.lane set epoch = epoch + 1, owner = gen_random_uuid(), place = 'elsewhere',"
        " lease_until = now() + interval '1 hour' where target = 'actor.default'"
    )
    company.note.send("new")
    until(lambda: not company.broker._delivery._estate.of("actor.default"), "the lane is lost")
    # Then its thread doesn't begin what is the other's
    stage.open_gate("gate")
    until(lambda: worker.work_queue.qsize() == 0, "the thread has looked at it")
    until(partial(_ended, company), "nothing is left in its hands")
    assert (stage.runs("fetched"), stage.runs("new")) == (0, 0)
    # And it runs once when the lane is free
    stage.admin.execute(TAKE_AWAY)
    stage.drained()
    assert (stage.runs("fetched"), stage.runs("new"), stage.parked()) == (1, 1, [])


def test_actor_i2_i10_messages_run_when_their_lane_was_lost_as_they_were_claimed(stage: Stage) -> None:
    # Given a worker that waits with its claim of a message for the database
    stage.work()
    stage.drained()
    waits = (
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        " and application_name = 'outbox actors'"
    )
    with psycopg.connect(stage.urls["postgres"]) as held:
        held.execute("lock table outbox.position in share mode")
        stage.company.note.send("x")
        until(lambda: stage.one(waits) == 1, "it waits")
        # When its lanes are taken away meanwhile
        stage.admin.execute(TAKE_AWAY)
    # Then the message runs all the same, once, and so do others
    stage.company.note.send("y")
    stage.drained()
    assert (stage.runs("x"), stage.runs("y"), stage.parked()) == (1, 1, [])


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_actor_i6_neither_result_nor_outcome_is_written_when_the_messages_row_is_anothers(
    stage: Stage, ends: str
) -> None:
    # Given a worker that runs a step of a saga from a row of its own
    company = stage.company
    verdict = "fails" if ends == "badly" else ""
    message = company.waits.message_with_options(args=("x", "gate", verdict), store_results=True)
    stage.work()
    stage.drained()
    with company.sessions.begin() as session:
        company.outbox.append(session, intent_of(message, saga=uuid4()))
    number = until(lambda: stage.one("select id from outbox.log where target = 'actor.default'"), "it is sent")
    until(lambda: stage.runs("x") == 1, "it runs")
    stage.admin.execute(TAKE_AWAY)
    until(lambda: stage.runs("x") == 2, "it runs again, with a row")
    assert stage.one("select reason from outbox.parked where id = %s", number) == "running"
    # When another consumer has the row
    stage.admin.execute("update outbox.parked set holder = %s where id = %s", (uuid4(), number))
    stage.admin.execute(
        "insert into outbox.consumer (target, owner, place, busy, lease_until)"
        " select 'actor.default', holder, 'elsewhere', true, now() + interval '1 hour' from outbox.parked"
    )
    stage.open_gate("gate")
    until(partial(_ended, company), "both have ended")
    assert company.tells.send("after").get_result(backend=company.results, block=True, timeout=int(LIMIT * 1000))
    # Then it is still that one's, nothing is kept for a retry, nobody has a result, and no saga hears
    assert stage.one("select count(*) from outbox.receipt") == 0
    assert stage.one("select reason from outbox.parked where id = %s", number) == "running"
    with pytest.raises(ResultMissing):
        company.results.get_result(message)
    assert stage.one("select count(*) from outbox.log where target = 'saga'") == 0
