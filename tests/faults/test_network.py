"""The network between workers and Postgres: black holes, packets that come late, resets, a lost reply to COMMIT."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest

from outbox import lane as lanes
from outbox.errors import Fenced
from tests.fixtures.lanes import TARGET, Bench
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import LIMIT, until
from tests.fixtures.zombie import House


@pytest.fixture
def through(house: House, proxy: Proxy, database: str) -> Iterator[dict[str, str]]:
    """The environment of a worker whose database is behind the proxy."""
    yield {"OUTBOX_DATABASE": proxy.url("outbox_worker", database)}
    proxy.heal()


@pytest.mark.parametrize(
    ("fault", "target"),
    [("swallow", "index"), ("swallow", "ledger"), ("hold", "index"), ("hold", "blob"), ("hold", "mail")],
)
def test_network_i3_i6_i10_lane_is_taken_over_when_its_owner_is_cut_off(
    house: House, proxy: Proxy, through: dict[str, str], fault: str, target: str
) -> None:
    # Given: an owner at work, and a network that takes everything and delivers nothing, or delivers it later
    house.start("clock")
    cut_off = house.start(target, **through)
    house.emit(target, "a")
    house.drained(target, "a")
    getattr(proxy, fault)()
    house.emit(target, "b", "c")

    # When: another worker is there
    successor = house.start(target)

    # Then: it takes over, and does what is left
    until(lambda: house.owner(target) == successor.pid, "the lane has another owner")
    house.drained(target, "a", "b", "c")

    # And: after the network is healed, nothing comes twice, and the first goes on where the second ends
    proxy.heal()
    successor.terminate()
    assert successor.wait(LIMIT) == 0
    house.emit(target, "d")
    house.drained(target, "a", "b", "c", "d")
    assert house.owner(target) == cut_off.pid
    assert house.never_went_back()


def test_network_i10_lane_is_kept_when_only_its_renewals_are_swallowed(
    house: House, proxy: Proxy, through: dict[str, str]
) -> None:
    # Given: an owner whose renewals get no answer, now and in all connections to come
    house.start("clock")
    house.start("blob", **through)
    house.emit("blob", "a")
    house.drained("blob", "a")
    proxy.swallow("lease")
    ends = house.site.one("select lease_until + interval '6 s' from outbox.lane where target = 'blob'")

    # When: three more leases have gone by
    until(lambda: house.site.admin.execute("select now() > %s", (ends,)).fetchone() == (True,), "three leases")
    house.emit("blob", "b")
    house.drained("blob", "a", "b")

    # Then: it asked on the connection that it works with, and was never fenced
    assert "stops" not in house.log()


def test_network_i10_lane_is_given_up_when_only_its_work_is_swallowed(
    house: House, proxy: Proxy, through: dict[str, str]
) -> None:
    # Given: an owner whose lease is renewed while its own statements get no answer
    house.start("clock")
    cut_off = house.start("blob", **through)
    house.emit("blob", "a")
    house.drained("blob", "a")
    proxy.swallow("outbox blob/0")

    # When
    house.emit("blob", "b")
    successor = house.start("blob")

    # Then: it doesn't keep the lane for nothing
    until(lambda: house.owner("blob") == successor.pid, "the lane has another owner")
    house.drained("blob", "a", "b")
    proxy.heal()
    assert cut_off.poll() is None
    assert house.never_went_back()


@pytest.mark.parametrize("statement", ["pg_backend_pid", "alembic_version", "select lane from outbox.lane"])
def test_network_i10_worker_starts_when_its_first_connection_is_lost_at_once(
    house: House, proxy: Proxy, through: dict[str, str], statement: str
) -> None:
    # Given: a network that breaks with the first statements of a worker
    house.start("clock")
    house.emit("blob", "a")
    proxy.cut_statement(statement)

    # When
    worker = house.start("blob", **through)

    # Then: it tries again, and is the same process
    house.drained("blob", "a")
    assert proxy.has_cut
    assert worker.poll() is None


def test_network_i1_i2_i3_i10_loses_and_repeats_nothing_when_connections_are_reset_at_random(
    house: House, proxy: Proxy, through: dict[str, str]
) -> None:
    # Given: every process behind a slow network, and traffic
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    proxy.delay = 0.002
    targets = ("index", "blob", "mail", "ledger")
    workers = [house.start(target, **through) for target in ("clock", *targets)]
    emitted: dict[str, list[str]] = {target: [] for target in targets}

    # When: a connection is reset, and another, and another
    resets = round_ = 0
    while resets < 20:
        round_ += 1
        for target in targets:
            emitted[target].append(f"{target}-{round_}")
            house.emit(target, emitted[target][-1])
        until(proxy.names, "somebody is connected")
        resets += proxy.reset(chance.choice([*proxy.names(), "nobody"]))
        time.sleep(chance.uniform(0, 0.3))  # the pace of the nemesis, nothing is waited for

    # Then
    for target in targets:
        house.drained(target, *emitted[target])
    assert all(worker.poll() is None for worker in workers)
    assert house.never_went_back()


def test_network_i6_write_that_arrives_after_a_takeover_is_refused(bench: Bench, proxy: Proxy, database: str) -> None:
    # Given: an owner whose position is on its way
    with psycopg.connect(proxy.url("outbox_worker", database), autocommit=True) as conn:
        old = lanes.claim(conn, TARGET, 0, owner=uuid.uuid4(), ttl=600)
        assert old is not None
        position = old.stand(conn)
        proxy.hold()
        refused: list[BaseException] = []

        def write() -> None:
            try:
                old.advance(conn, position)
            except Fenced as error:
                refused.append(error)

        writing = threading.Thread(target=write)
        writing.start()

        # When: its lease runs out, another claims the lane, and then the write arrives
        bench.die()
        new = bench.claim()
        new.advance(bench.conn, position)
        assert writing.is_alive()
        proxy.heal()
        writing.join(LIMIT)

    # Then
    assert len(refused) == 1
    assert bench.admin.execute("select array_agg(epoch) from outbox.position").fetchone() == ([new.epoch],)
