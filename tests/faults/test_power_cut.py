"""The power is cut under traffic, again and again: nothing that was reported is gone.

Reported to the application: a COMMIT that was answered; a participant that had reached a transaction. The same look at
the disk must find a loss when the index's or the blob store's folder isn't synced, or the workers' commits don't wait.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from outbox.errors import BlobRefused, Unavailable
from outbox.position import Position
from tests.fixtures.power import Machine, Traffic
from tests.fixtures.promises import indexed
from tests.fixtures.site import LIMIT, until
from workers.index import IndexParticipant
from workers.shard import POSITION, xapian

pytestmark = [pytest.mark.root, pytest.mark.slow]

CYCLES = 20

#: Cuts after which a worker that doesn't do its duty must have lost something. Mostly it is the first.
BITES = 12


@pytest.fixture
def machines() -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(*targets: str, before: str = "") -> Machine:
        made.append(Machine(targets, before=before))
        return made[-1]

    try:
        yield make
    finally:
        for machine in made:
            machine.close()


def losses(traffic: Traffic) -> list[str]:
    """What was reported and is not there, before any worker has run again."""
    machine = traffic.machine
    found = []
    with machine.connect(autocommit=True) as conn:
        held = {int(row[0]) for row in conn.execute("select distinct xid::text from outbox.log")}
        found += [f"transaction {xid}" for xid in traffic.committed if xid not in held]
        found += [f"position behind transaction {xid}" for xid in traffic.applied if not traffic.reached(conn, xid)]
        if "index" in machine.targets:
            found += _index_losses(machine, conn)
    if "blob" in machine.targets and traffic.applied:
        last = traffic.applied[-1]
        for digest, xid in traffic.blobs.items():
            if xid <= last and not (machine.store.exists(digest) and machine.store.verify(digest)):
                found.append(f"blob of transaction {xid}")
    return found


def _index_losses(machine: Machine, conn: psycopg.Connection[Any]) -> list[str]:
    try:
        text = xapian.Database(str(machine.index / "00")).get_metadata(POSITION).decode()
        items = {item.key: (item.id, item.digest) for item in IndexParticipant(machine.index).inventory()}
    except (xapian.DatabaseError, Unavailable) as error:
        stands = conn.execute("select from outbox.position where target = 'index' and tick > 1").fetchone()
        return [f"the index ({type(error).__name__})"] if stands else []
    own = Position.parse(text) if text else None
    stand = conn.execute(
        "select tick, upto, after from outbox.position where target = 'index' order by seq desc limit 1"
    ).fetchone()
    found = []
    if stand is not None and (own is None or (own.tick, own.upto, own.after) < stand):
        found.append(f"index: it stands at {text or 'the beginning'}, and was reported at {stand}")
    if own is not None:
        snapshot = "pg_visible_in_snapshot(xid, (select snapshot from outbox.tick where id = {}))"
        begun = f"id <= {own.after} and {snapshot.format(own.upto)}" if own.upto else "false"
        passed = f"({snapshot.format(own.tick)} or {begun})"
        ticks = {int(row[0]) for row in conn.execute("select id from outbox.tick where nonce = %s", (own.nonce,))}
        if own.tick not in ticks:
            found.append(f"index: tick {own.tick} that it stands at")
        elif items != indexed(conn, passed):
            found.append("index: its documents are not those of its position")
    return found


def traffic_until_cut(traffic: Traffic, chance: random.Random, *, told: bool) -> None:
    """Write until the power goes: right after a report (`told`), or at any moment."""
    machine = traffic.machine
    assert machine.disk is not None
    timer = threading.Timer(chance.uniform(0.1, 1.0), machine.disk.cut)
    try:
        with machine.connect("app") as conn, machine.connect("app") as look:
            traffic.wait(look, traffic.write(conn))
            if told:
                for _ in range(chance.randrange(1, 5)):
                    traffic.wait(look, traffic.write(conn))
                return
            timer.start()
            deadline = time.monotonic() + LIMIT
            while time.monotonic() < deadline:
                last = traffic.write(conn)
                if chance.random() < 0.5:
                    traffic.wait(look, last)
            raise AssertionError("the power was not cut")
    except (psycopg.Error, BlobRefused):
        if told or not timer.ident:
            raise
        timer.join()


@pytest.mark.timeout(1200)
def test_power_cut_i1_i2_i5_nothing_that_was_reported_is_gone(machines: Callable[..., Machine]) -> None:
    # Given: traffic to index and blobs
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    machine = machines("index", "blob")
    traffic = Traffic(machine)
    machine.work()
    for cycle in range(CYCLES):
        # When: the power is cut, and comes back
        traffic_until_cut(traffic, chance, told=cycle % 2 == 0)
        machine.power_off()
        machine.power_on()

        # Then: everything reported is there, at once
        assert losses(traffic) == [], f"after cut {cycle + 1}"
        # And: what was committed and not yet applied follows by itself
        machine.work()
        with machine.connect(autocommit=True) as conn:
            last = traffic.committed[-1]
            until(lambda last=last, conn=conn: traffic.reached(conn, last), "drained")  # type: ignore[misc]
            assert conn.execute("select from outbox.parked").fetchone() is None
            assert {i.key: (i.id, i.digest) for i in IndexParticipant(machine.index).inventory()} == indexed(
                conn, f"xid::text::numeric <= {last}"
            )
        assert all(machine.store.verify(digest) for digest in traffic.blobs)
    assert len(traffic.applied) >= CYCLES


UNSYNCED = "import os; os.fsync = lambda fd: None"
ASYNCHRONOUS = """
from outbox import database
durable = database.connect
def connect(*words, **more):
    conn = durable(*words, **more)
    conn.execute("set synchronous_commit = off")
    return conn
database.connect = connect
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("target", "before", "lost"),
    [
        pytest.param("index", UNSYNCED, r"index: it stands at|the index \(", id="index-folder-not-synced"),
        pytest.param("blob", UNSYNCED, "blob of transaction", id="blob-folders-not-synced"),
        pytest.param("index", ASYNCHRONOUS, "position behind", id="commits-of-ticks-and-positions-not-waited-for"),
    ],
)
def test_power_cut_i12_something_is_gone_when_a_worker_does_not_wait_for_the_disk(
    machines: Callable[..., Machine], target: str, before: str, lost: str
) -> None:
    machine = machines(target, before=before)
    traffic = Traffic(machine)
    chance = random.Random(12)
    machine.work()
    for cut in range(BITES):
        traffic_until_cut(traffic, chance, told=True)
        machine.power_off()
        machine.power_on()
        found = losses(traffic)
        if found:
            print(f"cut {cut + 1}: {found}")
            assert any(re.match(lost, text) for text in found), found
            return
        machine.work()
    raise AssertionError(f"nothing was lost in {BITES} cuts")
