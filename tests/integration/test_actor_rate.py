"""Rates of actors: never more begin than may, nobody is asked all the time, and nothing is lost or counted as a try."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.errors import ConnectionFailed

from outbox import sql
from outbox.actor import OutboxBroker
from outbox.actor.rate import Rate
from outbox.errors import IntentRefused
from outbox.saga.run import Action
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until

T0 = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ask(
    conn: psycopg.Connection[Any], *keys: str, places: int, period: float, again: bool = False, begins: bool = True
) -> list[float]:
    row = conn.execute(
        "select outbox.rate_ask(%s, %s, %s, %s, %s)",
        (list(keys), [places] * len(keys), [period] * len(keys), [again] * len(keys), begins),
    ).fetchone()
    assert row is not None
    waits: list[float] = row[0]
    return waits


def at(conn: psycopg.Connection[Any], seconds: float) -> None:
    micro = timedelta(microseconds=round(seconds * 1_000_000))
    conn.execute("select set_config('outbox.fake_now', %s, false)", ((T0 + micro).isoformat(),))


# ------------------------------------------------------------------------------------------- the window


@pytest.mark.parametrize(("places", "period", "seed"), [(1, 10, 1), (3, 10, 2), (100, 60, 3), (7, 1, 4), (250, 60, 5)])
def test_rate_never_lets_more_begin_than_may_in_any_period(
    admin: psycopg.Connection[Any], places: int, period: float, seed: int
) -> None:
    # Given 4 times as many messages as may begin in a period, that come in bursts and trickles
    chance = random.Random(seed)
    coming = [chance.choice([0.0, round(chance.uniform(0, period), 6)]) for _ in range(4 * places)]
    due = [(time, False) for time in coming]
    begun: list[float] = []
    asked = 0
    # When each asks when it comes, and again when it was told to, or a little later
    while due:
        due.sort()
        time, again = due.pop(0)
        at(admin, time)
        (wait,) = ask(admin, "k", places=places, period=period, again=again)
        asked += 1
        if wait:
            due.append((round(time + wait + chance.choice([0, 0, chance.uniform(0, period / places)]), 6), True))
        else:
            begun.append(time)
    # Then in no period more have begun than may
    begun.sort()
    assert len(begun) == 4 * places
    assert all(round(later - earlier, 6) >= period for earlier, later in zip(begun, begun[places:], strict=False))
    # And they didn't take much longer than they must, and didn't ask much more often
    assert begun[-1] <= 4.5 * period + period / places
    assert asked <= 3 * len(begun)
    # And what is kept is small
    row = admin.execute("select cardinality(begins) from outbox.rate").fetchone()
    assert row is not None
    assert row[0] <= 101


def test_rate_of_each_key_is_its_own_and_a_guess_counts_nothing(admin: psycopg.Connection[Any]) -> None:
    # Given two keys with two places each
    at(admin, 0)
    # When it is only asked how it would be
    assert ask(admin, "a", "b", "a", "a", places=2, period=60, begins=False) == [0, 0, 0, 60]
    assert ask(admin, "a", places=2, period=60, begins=False) == [0]
    # Then nothing has counted; and when they begin, it does
    assert ask(admin, "a", "a", "b", places=2, period=60) == [0, 0, 0]
    at(admin, 20)
    assert ask(admin, "b", "a", places=2, period=60) == [0, 70]  # behind the one that was told 60
    assert ask(admin, "a", places=2, period=60, again=True) == [40]  # the next place that comes free
    # And the same key with another rate is another one
    assert ask(admin, "a", places=3, period=60) == [0]


def test_rate_goes_on_when_the_databases_clock_was_set_back(admin: psycopg.Connection[Any]) -> None:
    # Given a rate that was used in a time that is now a day ahead
    at(admin, 24 * 3600)
    assert ask(admin, "k", "k", "k", places=3, period=60) == [0, 0, 0]
    # When the clock is right again
    at(admin, 0)
    # Then nobody waits for that day
    assert ask(admin, "k", "k", "k", "k", places=3, period=60)[:3] == [0, 0, 0]


def test_rate_counts_what_begins_while_housekeeping_removes_its_row(stage: Stage) -> None:
    # Given a rate of one in an hour, of which nothing was asked for longer, and housekeeping that has come to it first
    def begin() -> list[float]:
        with psycopg.connect(stage.app.database, autocommit=True) as conn:
            return ask(conn, "k", places=1, period=3600)

    assert begin() == [0]
    stage.admin.execute("update outbox.rate set expires_at = '-infinity', begins = '{}', counts = '{}'")
    with ThreadPoolExecutor(1) as pool:
        with stage.admin.transaction():
            stage.admin.execute("select from outbox.rate for update")
            # When somebody has seen that it is there, and asks
            asks = pool.submit(begin)
            waits = "select 1 from pg_locks where locktype = 'transactionid' and not granted"
            until(partial(stage.one, waits), "it waits")
            stage.admin.execute(sql.load("rate_expire"), {"after": "", "limit": 1000})
        assert asks.result(LIMIT) == [0]
    # Then that has counted: the next one has to wait
    assert begin()[0] > 3000


def test_rate_is_exact_when_many_ask_at_the_same_time(stage: Stage) -> None:
    # Given twelve who ask at the same time for two keys, in either order
    def begin(n: int) -> int:
        with psycopg.connect(stage.app.database, autocommit=True) as conn:
            keys = ("a", "b") if n % 2 else ("b", "a")
            return sum(ask(conn, *keys, places=25, period=3600).count(0) for _ in range(10))

    with ThreadPoolExecutor(12) as pool:
        begun = sum(pool.map(begin, range(12)))
    # Then as many begin as may, of each
    assert begun == 50
    assert stage.admin.execute(
        "select key, (select sum(n) from unnest(counts) n) from outbox.rate order by 1"
    ).fetchall() == [
        ("a", 25),
        ("b", 25),
    ]


# ---------------------------------------------------------------------------------------------- workers


def test_rate_is_kept_by_several_workers_and_others_of_the_queue_go_on(stage: Stage) -> None:
    # Given twenty messages of which seven may begin in an hour, before others in the same queue
    for n in range(20):
        stage.company.seldom.send(f"seldom {n}")
    for n in range(20):
        stage.company.note.send(f"note {n}")
    # When three worker processes are there
    for _ in range(3):
        stage.start()
    begun = "select count(*) from effect where name ~ 'seldom'"
    waiting = "select count(*) from outbox.parked where reason = 'retry' and retry_at > outbox.now()"
    for hour in range(1, 4):
        # Then seven begin in each hour, and no more; the others wait, and have not been tried
        expected = min(7 * hour, 20)
        until(partial(stage.one, f"select ({begun}) = {expected}"), f"so many have begun in hour {hour}")
        until(partial(stage.one, f"select ({waiting}) = {20 - expected}"), f"so many wait in hour {hour}")
        assert stage.one(f"{waiting} and attempts > 0") == 0
        # And the others are done
        until(lambda: stage.one("select count(distinct name) from effect where name ~ 'note'") == 20, "they are done")
        stage.later(2 * 3600)
    stage.drained()
    assert stage.one("select count(distinct name) from effect where name ~ 'seldom'") == 20
    assert stage.parked() == []


def test_rate_is_kept_by_the_thread_that_begins_when_more_were_handed_out_than_may_begin(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that hands out everything, as two may that guess at the same time
    rates, real = stage.company.broker.rates, stage.company.broker.rates.waits
    monkeypatch.setattr(rates, "waits", lambda *args, begins: real(*args, begins=True) if begins else {})
    hears: list[str] = []

    class Hears(dramatiq.Middleware):
        def before_process_message(self, _broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            hears.append(message.message_id)

        def after_skip_message(self, _broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            hears.append(f"skipped {message.message_id}")

    stage.company.broker.add_middleware(Hears())
    for n in range(12):
        stage.company.seldom.send(f"seldom {n}")
    # When it works
    stage.work(threads=8)
    # Then those are put back, untried, that are too many, and middleware has never seen them
    until(lambda: len(stage.parked()) == 5, "five are put back")
    assert stage.parked() == [("retry", 0, "it is over its rate limit, and waits for its turn")] * 5
    assert len(hears) == 7
    assert stage.one("select count(*) from effect") == 7
    # And they come when it is their turn
    stage.later(2 * 3600)
    stage.drained()
    assert (len(hears), stage.parked(), stage.one("select count(*) from effect")) == (12, [], 12)


def test_rate_counts_retries_as_well_and_they_keep_their_number_when_they_are_put_back(stage: Stage) -> None:
    # Given an actor that fails, three times an hour at most
    runs = []

    @dramatiq.actor(broker=stage.company.broker, rate_limit="3/h", max_retries=4, min_backoff=10, max_backoff=10)
    def stumbles() -> None:
        runs.append(1)
        raise RuntimeError("always")

    stage.work()
    # When it has failed three times
    stumbles.send()
    until(lambda: stage.parked() == [("retry", 3, "it is over its rate limit, and waits for its turn")], "it waits")
    # Then it waits for its next try, and after the fifth it is given up as always
    assert len(runs) == 3
    stage.later(3601)
    until(lambda: [(reason, attempts) for reason, attempts, _ in stage.parked()] == [("poison", 5)], "it is given up")
    assert len(runs) == 5


def test_rate_i4_order_of_a_key_is_kept_when_its_messages_wait_for_their_rate(stage: Stage) -> None:
    # Given an actor whose messages run in order, two in an hour
    ran: list[int] = []

    @dramatiq.actor(broker=stage.company.broker, rate_limit="2/h", ordering_key="one")
    def drips(n: int) -> None:
        ran.append(n)

    for n in range(6):
        drips.send(n)
    # When they have their turns, hour by hour
    stage.work()
    for hour in range(1, 4):
        until(partial(lambda many: len(ran) == many, 2 * hour), f"so many in hour {hour}")
        if hour < 3:
            until(
                lambda: ("retry", 0, "it is over its rate limit, and waits for its turn") in stage.parked(), "it waits"
            )
        assert len(ran) == 2 * hour
        stage.later(2 * 3600)
    stage.drained()
    # Then it was in the order in which they were sent
    assert ran == list(range(6))


def test_rate_message_is_put_back_when_the_database_cannot_be_asked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a database that isn't there when a message is about to begin
    broker, failed = stage.company.broker, threading.Event()
    real = broker.run

    def run(work: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise ConnectionFailed("gone")
        return real(work)

    monkeypatch.setattr(broker, "run", run)
    # And an actor that has one try
    ran: list[str] = []

    @dramatiq.actor(broker=broker, rate_limit="7/h", max_retries=0)
    def single(name: str) -> None:
        ran.append(name)

    # When it is there again
    single.send("once")
    stage.work()
    stage.drained()
    # Then the message has run, and that was its first try
    assert failed.is_set()
    assert (ran, stage.parked()) == (["once"], [])


def test_rate_begins_anew_when_the_queue_was_flushed(stage: Stage) -> None:
    # Given many messages that were told a time far ahead
    for n in range(70):
        stage.company.seldom.send(f"seldom {n}")
    stage.work()
    until(lambda: len(stage.parked()) == 63, "they wait")
    far = stage.one("select max(retry_at) from outbox.parked")
    # When they are dropped, and others come
    stage.company.broker.flush("default")
    stage.company.seldom.send("new")
    until(lambda: len(stage.parked()) == 1, "it waits")
    # Then it waits for the next place, and not behind what is gone
    assert stage.one("select retry_at from outbox.parked") < far - timedelta(hours=2)


# ---------------------------------------------------------------------------------------------- options


def test_rate_key_is_a_function_of_the_arguments_or_said_with_the_message(stage: Stage) -> None:
    # Given an actor with a rate for each account
    company = stage.company
    ran: list[str] = []

    @dramatiq.actor(broker=company.broker, rate_limit="1/h", rate_key=lambda name, account: f"account {account}")
    def bill(name: str, account: int) -> None:
        ran.append(name)

    # When messages of several accounts are sent, and one with a key of its own
    bill.send("a1", 1)
    bill.send("a2", account=1)
    bill.send("b1", 2)
    bill.send_with_options(args=("c1", 1), rate_key="another")
    stage.work()
    # Then one of each begins
    until(lambda: len(ran) == 3 and len(stage.parked()) == 1, "three have begun, one waits")
    assert {name[0] for name in ran} == {"a", "b", "c"}
    # And a step of a saga has its key, too
    action: Action = company.broker.action(bill.message("d1", 3))
    assert json.loads(action.intent.body)["options"] == {"rate_key": "account 3"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rate_limit": "100"}, "is no rate"),
        ({"rate_limit": "0/m"}, "is no rate"),
        ({"rate_limit": "1/y"}, "is no rate"),
        ({"rate_limit": 100}, "is no rate"),
        ({"rate_limit": "1/m", "rate_key": 5}, "neither a string nor a function"),
        ({"rate_key": "k"}, "a rate_key and no rate_limit"),
    ],
)
def test_rate_is_refused_when_its_actor_is_declared(options: dict[str, Any], why: str) -> None:
    broker = OutboxBroker()
    with pytest.raises(ValueError, match=why):
        dramatiq.actor(broker=broker, **options)(lambda: None)
    assert not broker.actors


@pytest.mark.parametrize("key", ["", "x" * 401, "a\0b", 7, None])
def test_rate_key_is_refused_when_its_message_is_sent(stage: Stage, key: Any) -> None:
    # Given a function that makes no key
    @dramatiq.actor(broker=stage.company.broker, rate_limit="1/h", rate_key=lambda key: key)
    def limited(key: object) -> None:
        pass

    # When a message is sent: it is refused, before anything is written
    with pytest.raises(IntentRefused, match="rate_key of limited is no string"):
        limited.send(key)
    with pytest.raises(IntentRefused, match="the rate_key of limited raised TypeError"):
        limited.send_with_options(args=("too", "many"))
    assert stage.one("select count(*) from outbox.log") == 0


def test_rate_reads_how_many_in_which_time() -> None:
    assert Rate.read("100/m") == (100, 60)
    assert Rate.read("5/10s") == (5, 10)
    assert Rate.read("1/d") == (1, 86400)
