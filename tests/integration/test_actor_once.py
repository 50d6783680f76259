"""What an actor writes in its own transaction is written once, whatever happens to the connection, the lane, or the
worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import psycopg
import pytest

from tests.fixtures.actors import Company, Stage
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import until

_SLOW_COMMIT = """
create function slow() returns trigger language plpgsql as $$
begin
  perform pg_advisory_xact_lock_shared(7);
  return null;
end $$;
create constraint trigger slow after insert on payment deferrable initially deferred
  for each row execute function slow();
"""

_COMMITTING = "select count(*) from pg_stat_activity where wait_event = 'advisory' and query ilike 'commit%'"
_BEHIND_IT = """
select count(*) from pg_stat_activity
 where application_name = 'outbox actors' and wait_event_type = 'Lock' and datname = current_database()
"""


@pytest.fixture
def apart(stage: Stage, proxy: Proxy) -> Company:
    """Actors that reach the database through the proxy, and their worker doesn't."""
    url = proxy.url("app", stage.database)
    return stage.another(app=replace(stage.app, database=url))


@contextmanager
def slow_commit(stage: Stage) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Payments are being committed until the block ends, or the connection ends that it gives."""
    with psycopg.connect(stage.urls["app"], autocommit=True) as conn:
        conn.execute(_SLOW_COMMIT)
        conn.execute("select pg_advisory_lock(7)")
        yield conn


@pytest.mark.parametrize("delay", [None, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_actor_i3_payment_is_made_once_when_the_answer_to_its_commit_never_came(
    stage: Stage, proxy: Proxy, apart: Company, when: Literal["before", "after"], delay: int | None
) -> None:
    # Given an actor whose connection is cut as it commits: the message comes from its lane, or was parked
    stage.work(apart)
    stage.drained()
    proxy.cut_commit(when)
    # When it pays
    stage.company.pay.send_with_options(args=("x",), delay=delay)
    until(lambda: proxy.has_cut, "the commit was cut")
    stage.drained()
    # Then it is paid once: it was run again only if the commit had not arrived
    assert (stage.payments(), stage.runs("x")) == (["x"], 1 if when == "after" else 2)
    assert (stage.parked(), stage.one("select count(*) from outbox.receipt")) == ([], 0)


def test_actor_i3_payment_is_made_once_when_its_lane_is_handed_over_as_it_commits(stage: Stage) -> None:
    # Given an actor that is committing
    worker = stage.work()
    with slow_commit(stage):
        stage.company.pay.send("x")
        until(lambda: stage.one(_COMMITTING), "it is committing")
        # When its worker gives the lanes away, and has to wait for that
        stage.forget(worker)
        ending = threading.Thread(target=worker.stop)
        ending.start()
        until(lambda: stage.one(_BEHIND_IT), "the worker waits for the actor")
    # Then it is paid once, and the next owner doesn't run it again
    ending.join()
    stage.work(stage.another())
    stage.drained()
    assert (stage.payments(), stage.runs("x"), stage.parked()) == (["x"], 1, [])
    assert stage.one("select count(*) from outbox.receipt") == 0


def test_actor_i3_payment_is_made_once_when_its_connection_is_lost_as_it_commits(
    stage: Stage, proxy: Proxy, apart: Company
) -> None:
    # Given an actor that is committing
    stage.work(apart)
    with slow_commit(stage):
        stage.company.pay.send("x")
        until(lambda: stage.one(_COMMITTING), "it is committing")
        # When its connection is lost, so that it is to be run again, and that has to wait for the outcome
        assert proxy.reset() > 0
        until(lambda: stage.one(_BEHIND_IT), "the worker waits for the outcome")
    # Then it is paid once
    stage.drained()
    assert (stage.payments(), stage.runs("x"), stage.parked()) == (["x"], 1, [])


def test_actor_i3_acknowledgement_counts_when_the_lane_is_handed_over_just_before_it(stage: Stage) -> None:
    # Given an actor that is to acknowledge in a moment, in a queue with one lane
    company = stage.another(lanes=1)
    worker = stage.work(company)
    company.waits_and_pays.send("x", "gate")
    until(lambda: stage.runs("x") == 1, "it runs")
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ~ %s"
    with psycopg.connect(stage.urls["actor"]) as held:
        # When its worker hands the lane over, and the actor acknowledges right after that
        held.execute("select from outbox.lane where target = 'actor.default' for update")
        stage.forget(worker)
        ending = threading.Thread(target=worker.stop)
        ending.start()
        until(lambda: stage.one(_BEHIND_IT), "the worker waits")
        stage.open_gate("gate")
        until(lambda: stage.one(waiting, "actor_done"), "the actor waits behind it")
    # Then it has paid: the message was in its hands all the time
    ending.join()
    stage.work(stage.another())
    stage.drained()
    assert (stage.payments(), stage.runs("x"), stage.parked()) == (["x"], 1, [])
