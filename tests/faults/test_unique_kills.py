"""Unique messages, when their workers are killed, and when many send them at once."""

from __future__ import annotations

import threading

import dramatiq

from outbox.actor import Duplicate
from tests.fixtures.actors import Company, Stage
from tests.fixtures.site import until

LOGGED = "select count(*) from outbox.log"


def test_unique_i6_one_is_not_sent_when_the_first_is_in_a_dead_workers_hands(stage: Stage) -> None:
    # Given a message whose worker is killed while it runs
    stage.company.waits.send_with_options(args=("a", "gate"), unique_key="k")
    process = stage.start()
    until(lambda: stage.runs("a") == 1, "it runs")
    until(lambda: stage.one("select count(*) from outbox.position where cardinality(open) > 0"), "it is claimed")
    process.kill()
    process.wait()
    # When it is sent again, before and after another worker has taken over
    assert isinstance(stage.company.waits.send_with_options(args=("a", "gate"), unique_key="k"), Duplicate)
    stage.start()
    until(lambda: stage.runs("a") == 2, "the other one runs it")
    assert isinstance(stage.company.waits.send_with_options(args=("a", "gate"), unique_key="k"), Duplicate)
    # Then it is done once more, and no more
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("a"), stage.one(LOGGED)) == (2, 1)


def test_unique_i3_each_key_is_sent_once_when_many_send_at_once(stage: Stage) -> None:
    # Given many threads that send the same few keys, in transactions that may roll back, while a worker runs them
    # (whose lease no load on the machine can take away: then two might run after all)
    company = Company(stage.app, stage.settings("actor", ttl=300.0))
    clashes: list[str] = []

    def watched(name: str) -> None:
        if name in running:
            clashes.append(name)
        running.add(name)
        company.ran(name)
        running.discard(name)

    running: set[str] = set()
    actor = dramatiq.actor(broker=company.broker, actor_name="watched", unique_key=True)(watched)
    stage._companies.append(company)
    stage.work(company, threads=8)

    def sender(number: int) -> None:
        for n in range(30):
            with company.sessions() as session:
                session.begin()
                actor.send(f"k{(n + number) % 3}")
                (session.rollback if n % 5 == 0 else session.commit)()

    threads = [threading.Thread(target=sender, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage.drained()
    # Then no two of one key were pending at once, and every one that was sent has run
    assert clashes == []
    assert stage.one("select count(*) from effect") == stage.one(LOGGED) > 0
