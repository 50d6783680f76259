"""PgBouncer in transaction mode between the workers and Postgres: no session of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
import pytest
from dramatiq import group
from dramatiq.rate_limits import Barrier, WindowRateLimiter

from outbox import migrate
from outbox.database import connect
from outbox.errors import NotReady
from outbox.settings import Settings
from tests.fixtures.actors import Stage
from tests.fixtures.pgbouncer import PgBouncer
from tests.fixtures.site import LIMIT, until
from tests.fixtures.zombie import House


@pytest.fixture
def pooled(house: House, pgbouncer: PgBouncer, database: str) -> dict[str, str]:
    """The environment of a worker whose database is behind PgBouncer, with two server connections for all."""
    return {"OUTBOX_DATABASE": pgbouncer.url("outbox_worker", database)}


def test_pgbouncer_i2_i3_i6_workers_drain_and_keep_their_lanes_through_it(house: House, pooled: dict[str, str]) -> None:
    # Given: every process behind PgBouncer, two of each kind
    targets = ("index", "blob", "mail", "ledger")
    workers = {target: [house.start(target, **pooled) for _ in range(2)] for target in ("clock", *targets)}
    names = {target: [f"{target}-{n}" for n in range(30)] for target in targets}

    # When: there is traffic, more statements of each kind than psycopg executes before it prepares them
    for n in range(30):
        for target in targets:
            house.emit(target, names[target][n])
    for target in targets:
        house.drained(target, *names[target])

    # Then: a dead owner is replaced through it, and nothing is complained about
    for target in ("clock", "blob"):
        owner = until(partial(house.owner, target), f"{target} has an owner")
        next(worker for worker in workers[target] if worker.pid == owner).kill()
    for target in targets:
        house.emit(target, f"{target}-last")
        house.drained(target, *names[target], f"{target}-last")
    assert house.never_went_back()
    assert "prepared statement" not in house.log()
    assert "Traceback" not in house.log()
    everybody = [worker for two in workers.values() for worker in two]
    for worker in everybody:
        worker.terminate()
    assert sorted(worker.wait(LIMIT) for worker in everybody) == [-9, -9] + [0] * 8


def test_pgbouncer_wait_returns_when_the_participant_has_it(
    house: House, pooled: dict[str, str], pgbouncer: PgBouncer, database: str
) -> None:
    # Given: an application behind PgBouncer as well
    house.start("clock", **pooled)
    house.start("index", **pooled)
    shop = House(house.site, pgbouncer.url("app", database), house.smtp)
    names = [f"k{n}" for n in range(12)]
    shop.emit("index", *names)

    # When: it waits for its last transaction
    with shop.sessions() as session:
        shop.outbox.index.put(session, "last", text="text")
        session.commit()
        shop.outbox.wait(session, shop.outbox.token(session), "index", timeout=LIMIT)
    shop.engine.dispose()

    # Then
    assert house.effects("index").keys() == {*names, "last"}


def test_pgbouncer_is_recognised_and_a_plain_connection_is_not_taken_for_one(
    pgbouncer: PgBouncer, worker_url: str, database: str
) -> None:
    with (
        connect(worker_url, name="test") as direct,
        connect(pgbouncer.url("outbox_worker", database), name="t") as conn,
    ):
        assert not direct.pooled
        assert conn.pooled
        for _ in range(20):
            conn.execute("select 1 + %s", (1,))
        # Nothing was left in the server's session for the next client.
        assert conn.execute("select count(*) from pg_prepared_statements").fetchone() == (0,)
        assert conn.execute("select current_setting('enable_seqscan')").fetchone() == ("on",)
        assert direct.execute("select current_setting('enable_seqscan')").fetchone() == ("off",)


def test_pgbouncer_is_refused_by_migrate_which_holds_a_lock_of_its_session(pgbouncer: PgBouncer, database: str) -> None:
    with pytest.raises(NotReady, match="a URL that goes past it"):
        migrate.upgrade(pgbouncer.url("postgres", database))


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        pytest.param("synchronous_commit", "off", "on", id="commits_would_not_wait_for_the_disk"),
        pytest.param(
            "default_transaction_isolation", "'serializable'", "'read committed'",
            id="transactions_would_not_see_what_they_waited_for",
        ),
    ],
)  # fmt: skip
def test_pgbouncer_i2_i5_is_refused_when(
    pgbouncer: PgBouncer, admin: psycopg.Connection[Any], database: str, name: str, wrong: str, right: str
) -> None:
    # Given: a database with another default, and a pooler, which forgets what a session sets
    admin.execute(f"alter database {database} set {name} = {wrong}")

    def says() -> str:
        # The server's sessions are new: settings of a database or a role count from the next one on.
        admin.execute("select pg_terminate_backend(pid, 90000) from pg_stat_activity where usename = 'outbox_worker'")
        try:
            connect(pgbouncer.url("outbox_worker", database), name="test").close()
        except NotReady as error:
            return str(error)
        return "connected"

    # When, Then: the worker doesn't start, and says how it would
    until(lambda: f"run ALTER ROLE outbox_worker SET {name} = {right}" in says(), "it is refused")

    # When, Then: it is done as it said
    admin.execute(f"alter role outbox_worker in database {database} set {name} = {right}")
    until(lambda: says() == "connected", "it is accepted")


def test_pgbouncer_i3_actors_have_their_results_limits_and_rates_through_it(
    stage: Stage, pgbouncer: PgBouncer, database: str
) -> None:
    # Given: application and worker behind PgBouncer
    app, worker = (Settings(pgbouncer.url(user, database), None, None, stage.app.smtp) for user in ("app", "actor"))
    company = stage.another(app=app, worker=worker)
    stage.work(company)

    # When: there are results to wait for, a group, a barrier, a window, and more than may begin in an hour
    messages = [company.tells.send(f"m{n}") for n in range(10)]
    members = [company.tells.message(f"g{n}") for n in range(3)]
    whole = group(members, broker=company.broker)
    whole.add_completion_callback(company.note.message("whole"))
    whole.run()
    for n in range(20):
        company.seldom.send(f"seldom {n}")
    barrier = Barrier(company.limits, "barrier")
    assert barrier.create(2)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait)
        until(lambda: stage.one("select value from outbox.tally where key = 'barrier'") == 1, "it waits")
        assert barrier.wait()
        assert waits.result(LIMIT)
    window = WindowRateLimiter(company.limits, "window", limit=2, window=3600)
    acquired = [window._acquire() for _ in range(3)]

    # Then: all of it is as without
    for message in [*messages, *members]:
        found = company.results.get_result(message, block=True, timeout=int(LIMIT * 1000))
        assert found == f"result of {message.args[0]}"
    assert acquired == [True, True, False]
    until(lambda: stage.runs("whole") == 1, "the group calls back")
    until(lambda: len(stage.parked()) == 13, "the others wait")
    assert stage.one("select count(*) from effect where name ~ 'seldom'") == 7


def test_pgbouncer_i2_i3_i6_actors_of_several_processes_go_on_through_it_when_one_is_killed(
    stage: Stage, pgbouncer: PgBouncer, database: str
) -> None:
    # Given: two worker processes behind PgBouncer, one of which runs something long
    users = {"OUTBOX_DATABASE": "app", "OUTBOX_ACTOR_DATABASE": "actor"}
    stage.more = {name: pgbouncer.url(user, database) for name, user in users.items()}
    workers = {worker.pid: worker for worker in (stage.start() for _ in range(2))}
    owners = "select count(distinct owner) from outbox.lane where target = 'actor.default'"
    until(lambda: stage.one(owners) == 2, "they share the lanes")
    stage.company.waits.send("held", "gate")
    until(lambda: stage.runs("held"), "it runs")
    for _ in range(3):
        stage.traffic()

    # When: that one is killed
    killed = workers.pop(stage.one("select pid from effect where name = 'held'"))
    killed.kill()
    killed.wait()
    stage.traffic()

    # Then: the other one has all of it, the long one too
    until(lambda: stage.runs("held") == 2, "it runs again")
    stage.open_gate("gate")
    stage.drained("default", "other")
    (other,) = workers.values()
    other.terminate()
    assert other.wait(LIMIT) == 0
    # And: everything has come true, as it does without
    stage.admin.execute("delete from effect where name = 'held'")
    stage.survive()
