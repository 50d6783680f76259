"""Keys of actors: order, one at a time, and so many at a time."""

from __future__ import annotations

from outbox.decision import decide
from tests.fixtures.actors import Stage
from tests.fixtures.site import until

RUNS = "select array_agg(name order by seq) from effect where name ~ %s"
BLOCKED = "select count(*) from outbox.parked where reason = 'blocked'"


def test_actor_i4_key_runs_in_order_and_others_go_on_when_one_fails_or_takes_long(stage: Stage) -> None:
    # Given messages of two keys: the first of one fails at first, the first of the other runs until the gate is open
    company = stage.company
    company.note.send_with_options(args=("b late",), ordering_key="b", delay=24 * 3600 * 1000)
    stage.work()
    company.flaky.send_with_options(args=("a0",), ordering_key="a")
    company.waits.send_with_options(args=("b0", "gate"), ordering_key="b")
    for n in range(1, 4):
        for key in "ab":
            company.note.send_with_options(args=(f"{key}{n}",), ordering_key=key)
    # When the first key has gone on after the failure, in order
    until(lambda: stage.one(RUNS, "^a") == ["a0", "a0", "a1", "a2", "a3"], "the first key is done, in order")
    # Then nothing of the other one has begun but its first, and the rest is shown as waiting for that
    reasons = "select array_agg(reason order by id) from outbox.parked"
    until(lambda: stage.one(reasons) == ["due", "blocked", "blocked", "blocked"], "the rest of the other key waits")
    # Not even a delayed one whose time has come; but that is the next then
    stage.admin.execute("update outbox.parked set retry_at = now() where reason = 'due'")
    until(lambda: stage.one(reasons) == ["blocked"] * 4, "it waits, too")
    assert stage.one(RUNS, "^b") == ["b0"]
    stage.open_gate("gate")
    stage.drained()
    assert stage.one(RUNS, "^b") == ["b0", "b late", "b1", "b2", "b3"]
    assert stage.parked() == []


def test_actor_i4_key_waits_behind_a_dead_letter_until_an_operator_decides(stage: Stage) -> None:
    # Given a message of a key that is given up, with others behind it, and a delayed one that nobody waits for
    company = stage.company
    for name, late in (("late", 24 * 3600 * 1000), ("a1", None), ("a2", None)):
        if name == "a1":
            company.fails.send_with_options(args=("a0",), ordering_key="a")
        company.note.send_with_options(args=(name,), ordering_key="a", delay=late)
    stage.work()
    reasons = "select array_agg(reason order by id) from outbox.parked"
    until(lambda: stage.one(reasons) == ["due", "poison", "blocked", "blocked"], "they wait behind it")
    # When the delayed one's time comes, it is the first in the log, and runs
    stage.admin.execute("update outbox.parked set retry_at = now() where reason = 'due'")
    until(lambda: stage.runs("late") == 1, "it runs")
    # And the queue is as done as it gets without an operator
    stage.drained()
    assert stage.one(RUNS, "^a[12]") is None
    # And one that is to be passed when it is given up, of another key, holds up nobody
    company.fails.send_with_options(args=("b0",), ordering_key="b", pass_dead_letters=True)
    company.note.send_with_options(args=("b1",), ordering_key="b")
    until(lambda: stage.runs("b1") == 1, "it goes on without it")
    assert stage.one(RUNS, "^b") == ["b0", "b0", "b0", "b1"]
    company.note.send_with_options(args=("b2",), ordering_key="b")
    until(lambda: stage.runs("b2") == 1, "it is in nobody's way")
    # Who skips the first dead one
    dead = stage.one("select min(id) from outbox.parked where reason = 'poison'")
    assert [one.refused for one in decide(stage.admin, "skip", [dead])] == [None]
    stage.drained()
    # Then the others run
    until(lambda: stage.one(RUNS, "^a[12]") == ["a1", "a2"], "the others run, in order")
    assert [reason for reason, _, _ in stage.parked()] == ["skipped", "poison"]


def test_actor_i10_limit_is_kept_by_all_workers_and_others_go_on_when_many_wait(stage: Stage) -> None:
    # Given two workers with eight threads, in a queue of one lane, and many messages of a key of which two may run
    company, second = stage.another(lanes=1), stage.another()
    for n in range(150):
        company.waits.send_with_options(args=(f"w{n}", "gate"), concurrency_key="host", concurrency=2)
    stage.work(company)
    stage.work(second)
    # When the two have begun, and others are sent behind all that wait
    until(lambda: stage.one("select count(*) from effect") == 2, "two have begun")
    for n in range(20):
        company.note.send(f"n{n}")
    # Then the others are done, and what waits is in nobody's memory
    until(lambda: stage.one("select count(*) from effect where name ~ '^n'") == 20, "the others are done")
    until(lambda: stage.one(BLOCKED) == 148, "all the rest is parked")
    assert stage.one("select max(cardinality(open)) from outbox.position") <= 30
    assert stage.one("select count(*) from effect where name ~ '^w'") == 2
    # When the queue is flushed, nobody is in the way of the key any more
    company.broker.flush("default")
    assert stage.parked() == []
    company.note.send_with_options(args=("after",), concurrency_key="host", concurrency=2)
    until(lambda: stage.runs("after") == 1, "a new one runs")
