"""Keys of actors, when their workers end, are suspended, or lose the database."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from outbox import Saga
from outbox.saga.run import Action, Run
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until

RUNS = "select array_agg(name order by seq) from effect where name ~ %s"
BLOCKED = "select count(*) from outbox.parked where reason = 'blocked'"


def test_actor_i4_next_of_a_key_waits_for_another_process_when_its_lane_has_gone_elsewhere(stage: Stage) -> None:
    # Given a worker that runs the first messages of keys in order, and of limited ones, with one behind that waits
    company = stage.company
    keys: dict[str, dict[str, Any]] = {"a": {"ordering_key": "a"}, "b": {"concurrency_key": "b", "concurrency": 1}}
    keys |= {"c": {"ordering_key": "c"}, "d": {"concurrency_key": "d", "concurrency": 1}}
    for key, options in keys.items():
        company.waits.send_with_options(args=(f"{key}0", "gate"), **options)
    for key in "ab":
        company.note.send_with_options(args=(f"{key}1",), **keys[key])
    first = stage.start(OUTBOX_TTL="120")
    begun = "select count(*) from effect"
    until(lambda: stage.one(begun) == 4 and stage.one(BLOCKED) == 2, "they run, and two wait")
    # When it is told to end, and another one has all lanes, with more messages of those keys
    first.send_signal(signal.SIGTERM)
    stage.start(OUTBOX_TTL="120")
    for key in "cd":
        company.note.send_with_options(args=(f"{key}1",), **keys[key])
    for n in range(20):
        company.note.send(f"n{n}")
    until(lambda: stage.one("select count(*) from effect where name ~ '^n'") == 20, "the other one works in all lanes")
    # Then the next of each key waits for the first process
    until(lambda: stage.one(BLOCKED) == 4, "all of them wait")
    assert stage.one("select count(*) from effect where name ~ '1$' and name !~ '^n'") == 0
    stage.open_gate("gate")
    stage.drained()
    for key in keys:
        assert stage.one(RUNS, f"^{key}") == [f"{key}0", f"{key}1"]
    assert stage.one("select count(distinct pid) from effect where name ~ '^a'") == 2
    assert first.wait(LIMIT) == 0


def test_actor_i4_i6_payments_are_in_order_when_a_zombie_has_the_first_one(stage: Stage) -> None:
    # Given a worker that runs the first message of a key, and is suspended beyond its lease
    company = stage.company
    company.pays.send_with_options(args=("a0", "gate"), ordering_key="a")
    company.pay.send_with_options(args=("a1",), ordering_key="a")
    zombie = stage.start()
    until(lambda: stage.runs("a0") == 1 and stage.one(BLOCKED) == 1, "it runs, and the other waits")
    zombie.send_signal(signal.SIGSTOP)
    # When another one has paid both
    second = stage.start(OUTBOX_TTL="120")
    until(lambda: stage.runs("a0") == 2, "the other one runs it")
    assert stage.payments() == []
    stage.open_gate(f"gate/{second.pid}")
    until(lambda: stage.payments() == ["a0", "a1"], "it pays both")
    # And the zombie wakes up and wants to pay
    zombie.send_signal(signal.SIGCONT)
    stage.open_gate("gate")
    zombie.send_signal(signal.SIGTERM)
    assert zombie.wait(LIMIT) == 0
    stage.drained()
    # Then nothing has come after what follows it
    paid = [name for (name,) in stage.admin.execute("select name from payment order by seq")]
    assert paid == ["a0", "a1"]
    assert stage.parked() == []


def test_actor_i4_i10_order_is_kept_when_connections_are_lost(stage: Stage) -> None:
    # Given a worker in the middle of many messages of two keys
    stage.work()
    for n in range(1, 101):
        stage.company.step.send(f"step {n}")
        if n % 20 == 0:
            # When the database ends its connections, the one that keeps the leases too
            stage.admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'outbox actor%'"
            )
    stage.drained()
    # Then all have run, in order
    assert stage.one("select count(distinct name) from effect") == 100
    assert stage.parked() == []
    stage.kept_their_turns()


@dataclass
class Parcel:
    name: str


def test_actor_i7_saga_goes_back_at_once_when_its_message_waits_behind_a_dead_letter(stage: Stage) -> None:
    # Given a dead letter, and a saga whose message is behind it
    company = stage.company
    saga = Saga("parcel", Parcel)

    @saga.intent
    def tell(run: Run[Parcel]) -> Action:
        return company.broker.action(company.note.message_with_options(args=(run.input.name,), ordering_key="a"))

    @tell.undo
    def untell(run: Run[Parcel]) -> Action:
        return company.broker.action(company.note.message(f"not {run.input.name}"))

    company.fails.send_with_options(args=("a0",), ordering_key="a")
    stage.work()
    reasons = "select array_agg(reason order by id) from outbox.parked"
    until(lambda: stage.one(reasons) == ["poison"], "it is given up")
    with company.sessions.begin() as session:
        started = saga.start(session, Parcel("x"))
    with stage.engine(saga):
        until(lambda: stage.one(reasons) == ["poison", "blocked"], "the step waits behind it")
        # When the saga is cancelled
        stage.admin.execute("select outbox.saga_ask(%s, 'cancel')", (started,))
        ended = "select state from outbox.saga where id = %s and ended_at is not null"
        # Then it ends, though nobody has decided about the dead letter, and nothing had to be undone
        assert until(lambda: stage.one(ended, started), "the saga ends") == "compensated"
    assert (stage.runs("x"), stage.runs("not x"), stage.one(reasons)) == (0, 0, ["poison"])
