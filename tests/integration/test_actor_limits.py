"""What rate limiters, mutexes and barriers count in Postgres: exact for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import dramatiq
from dramatiq import group
from dramatiq.rate_limits import Barrier, ConcurrentRateLimiter

from outbox import sql
from outbox.actor import OutboxBroker, OutboxLimits
from outbox.settings import Settings
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until

DAY = 24 * 3600 * 1000


def count(url: str, tries: int) -> None:
    """Count one number up and another one down, in a process of its own, from several threads."""
    broker = OutboxBroker(settings=Settings(url, None, None, "smtp://127.0.0.1:1"))
    limits = OutboxLimits(broker)
    with ThreadPoolExecutor(4) as pool:
        up = sum(pool.map(lambda _: limits.incr("up", 1, 50, DAY), range(tries)))
        down = sum(pool.map(lambda _: limits.decr("down", 1, 1, DAY), range(tries)))
    limits.incr("counted up", up, 10**6, DAY)
    limits.incr("counted down", down, 10**6, DAY)
    broker.close()


def test_limits_are_exact_when_processes_count_at_the_same_time(stage: Stage) -> None:
    # Given a number that may grow to 50, and one that may fall from 31 to 1
    assert stage.company.limits.add("down", 31, DAY)
    # When three processes of four threads try that 40 times each
    context = multiprocessing.get_context("spawn")
    counting = [context.Process(target=count, args=(stage.app.database, 40)) for _ in range(3)]
    for process in counting:
        process.start()
    for process in counting:
        process.join(LIMIT)
    # Then both are at their bounds, and exactly so many tries came through
    found = dict(stage.admin.execute("select key, value from outbox.tally").fetchall())
    assert found == {"up": 50, "down": 1, "counted up": 50, "counted down": 30}


def test_limits_sum_waits_for_who_is_just_counting_in_its_window(stage: Stage) -> None:
    # Given a window with one place left, and somebody who takes it, in a transaction that is not over
    limits = stage.company.limits
    keys = [f"w@{second}" for second in range(5)]
    assert limits.incr("w@3", 1, 2, DAY)
    with ThreadPoolExecutor(1) as pool:
        with stage.admin.transaction():
            stage.admin.execute("select outbox.tally_change('w@2', 1, null, 2, 60, null)")
            # When another one asks for a place, under another second's key
            asks = pool.submit(limits.incr_and_sum, "w@1", lambda: keys, 1, 2, DAY)
            waits = "select 1 from pg_locks where locktype = 'advisory' and not granted"
            until(partial(stage.one, waits), "it waits")
        # Then it waits until the first one has it, and gets none
        assert asks.result(LIMIT) is False
    assert stage.one("select count(*) from outbox.tally where key = 'w@1'") == 0


def test_limits_count_a_number_that_housekeeping_removes_at_the_same_moment(stage: Stage) -> None:
    # Given a mutex whose holder's time has run out, and housekeeping that has come to it first
    limits = stage.company.limits
    assert limits.incr("mutex", 1, 1, DAY)
    stage.admin.execute("update outbox.tally set expires_at = '-infinity'")
    with ThreadPoolExecutor(1) as pool:
        with stage.admin.transaction():
            stage.admin.execute("select from outbox.tally for update")
            # When somebody has seen that it is there, and takes it
            takes = pool.submit(limits.incr, "mutex", 1, 1, DAY)
            waits = "select 1 from pg_locks where locktype = 'transactionid' and not granted"
            until(partial(stage.one, waits), "it waits")
            stage.admin.execute(sql.load("tally_expire"), {"after": "", "limit": 1000})
        assert takes.result(LIMIT) is True
    # Then nobody else can
    assert limits.incr("mutex", 1, 1, DAY) is False


def test_limits_mutex_comes_free_by_the_databases_clock_when_its_holder_was_killed(stage: Stage) -> None:
    # Given an actor that is killed while it holds a mutex for an hour at most
    mutex = ConcurrentRateLimiter(stage.company.limits, "mutex", limit=1, ttl=3600 * 1000)
    pid = os.fork()
    if not pid:
        with mutex.acquire():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    # When somebody else wants it
    with mutex.acquire(raise_on_failure=False) as acquired:
        assert not acquired
    # Then it is free after that hour
    stage.later(3601)
    with mutex.acquire(raise_on_failure=False) as acquired:
        assert acquired


def test_limits_barrier_lets_all_go_on_when_the_last_one_comes(stage: Stage) -> None:
    # Given two parties at a barrier of three, who wait without an end
    barrier = Barrier(stage.company.limits, "barrier", ttl=DAY)
    assert barrier.create(3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(barrier.wait) for _ in range(2)]
        until(lambda: stage.one("select value from outbox.tally where key = 'barrier'") == 1, "they wait")
        assert not any(one.done() for one in waiting)
        # When the third one comes
        assert barrier.wait()
        # Then they go on
        assert [one.result(LIMIT) for one in waiting] == [True, True]


def test_limits_group_calls_back_once_when_all_are_done_and_their_results_are_there(stage: Stage) -> None:
    # Given a callback that asks for the results of its group, and doesn't wait for them
    company = stage.company
    seen: list[list[str]] = []

    @dramatiq.actor(broker=company.broker)
    def complete() -> None:
        seen.append(list(whole.get_results()))

    members = [company.tells.message(f"m{n}") for n in range(8)]
    whole = group(members, broker=company.broker)
    whole.add_completion_callback(complete.message())
    # When the group runs
    stage.work()
    whole.run()
    # Then it is called once, and finds all of them
    until(lambda: seen, "it is called")
    stage.drained()
    assert seen == [[f"result of m{n}" for n in range(8)]]
    # And that is no accident: each result was stored by the transaction that counted its message
    assert stage.one("select exists (select from outbox.tally t join outbox.result r on r.xmin = t.xmin)")


def test_limits_group_is_not_complete_when_a_member_has_run_twice(stage: Stage) -> None:
    # Given a group of two, one of which waits
    company = stage.company
    whole = group([company.tells.message("quick"), company.waits.message("slow", "gate")], broker=company.broker)
    whole.add_completion_callback(company.note.message("complete"))
    whole.run()
    # When the worker is killed after the other one was counted, before it is acknowledged, and so it runs again
    process = stage.start(OUTBOX_FAILPOINT="actor.counted")
    assert process.wait(LIMIT) == -signal.SIGKILL
    stage.start()
    until(lambda: stage.runs("quick") == 2, "it runs again")
    mine = "select count(*) from outbox.parked p join outbox.log l using (id) where l.payload #>> '{args,0}' = 'quick'"
    until(lambda: stage.one(mine) == 0, "it is acknowledged")
    # Then the group is not complete
    assert stage.one("select count(*) from outbox.log where payload #>> '{args,0}' = 'complete'") == 0
    # And it is, once, when the slow one is done
    stage.open_gate("gate")
    until(lambda: stage.runs("complete"), "it is called")
    stage.drained()
    assert stage.runs("complete") == 1
