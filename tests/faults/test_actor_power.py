"""The power is cut under actors, again and again: nothing that was reported is gone, and nothing reported runs again.

Reported to the application: a send that returned; a result that it got. The same look must find a loss when the
workers' commits don't wait for the disk.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from dramatiq.errors import BrokerConnectionError
from dramatiq.results import ResultTimeout

from outbox.settings import Settings
from tests.faults.test_power_cut import ASYNCHRONOUS, machines  # noqa: F401 - a fixture
from tests.fixtures.actors import ROOT, TABLES, Company
from tests.fixtures.power import Machine
from tests.fixtures.site import LIMIT, until

pytestmark = [pytest.mark.root, pytest.mark.slow]

CYCLES = 5

#: Cuts after which a worker that doesn't do its duty must have lost something. Mostly it is the first.
BITES = 12

Machines = Callable[..., Machine]


class Office:
    """An application of actors on a machine, its worker in a process of its own, and what it was told."""

    def __init__(self, machine: Machine, before: str = "") -> None:
        self.machine, self._before = machine, before
        self._worker: subprocess.Popen[bytes] | None = None
        self._count = 0
        #: Names whose send was committed.
        self.sent: list[str] = []
        #: Names whose result was got, and how often they had run when the power came back.
        self.told: dict[str, int] = {}
        with machine.connect("app", autocommit=True) as conn:
            conn.execute(TABLES)

    def settings(self, user: str) -> Settings:
        return Settings(self.machine.postgres.url(user, "app"), None, None, "smtp://127.0.0.1:1")

    def work(self) -> None:
        self.machine.work()
        script = f"{self._before}\nfrom tests.fixtures.actors import main\nmain([])"
        environment = {
            **os.environ,
            "OUTBOX_DATABASE": self.machine.postgres.url("app", "app"),
            "OUTBOX_ACTOR_DATABASE": self.machine.postgres.url("actor", "app"),
            "OUTBOX_STATE": str(self.machine.index.with_name("state")),
            "OUTBOX_TTL": "5",
        }
        self._worker = subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT)

    def power_cycle(self) -> None:
        """The power is gone, and comes back; nothing runs yet."""
        assert self._worker is not None
        self.machine.power_off(self._worker)
        self.machine.power_on()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()

    def traffic_until_cut(self, chance: random.Random, *, told: bool) -> None:
        """Send until the power goes: right after a result has come (`told`), or at any moment."""
        disk = self.machine.disk
        assert disk is not None
        timer = threading.Timer(chance.uniform(0.1, 1.0), disk.cut)
        company = Company(self.settings("app"), self.settings("actor"))
        try:
            rounds = chance.randrange(1, 5)
            for turn in range(rounds) if told else range(1_000_000):
                self._send_and_wait(company)
                if turn == 0 and not told:
                    timer.start()
            if told:
                disk.cut()
        except (BrokerConnectionError, ResultTimeout, sa.exc.DBAPIError, psycopg.Error):
            if not self.machine.dark:
                raise
        finally:
            timer.cancel()
            company.close()

    def _send_and_wait(self, company: Company) -> None:
        """A transaction of three messages, and the result of one."""
        self._count += 1
        names = [f"{kind} {self._count}" for kind in ("told", "paid", "noted")]
        with company.sessions.begin():
            message = company.tells.send(names[0])
            company.pay.send(names[1])
            company.note.send(names[2])
        self.sent += names
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            try:
                found = company.results.get_result(message, block=True, timeout=1000)
            except ResultTimeout:
                # Whoever waits goes on waiting when the connection is lost.
                if self.machine.dark:
                    raise
                continue
            assert found == f"result of {names[0]}"
            self.told[names[0]] = 0
            return
        raise AssertionError("no result in time")

    def losses(self) -> list[str]:
        """What was reported and is not there, before any worker has run again."""
        with self.machine.connect(autocommit=True) as conn:
            log = {
                row[0] for row in conn.execute("select payload #>> '{args,0}' from outbox.log where target ~ 'actor'")
            }
            found = [f"message {name}" for name in self.sent if name not in log]
            results = {row[0] for row in conn.execute("select value::json #>> '{}' from outbox.result")}
            found += [f"result of {name}" for name in self.told if f"result of {name}" not in results]
            runs = dict(conn.execute("select name, count(*) from effect group by name").fetchall())
        self.told = {name: runs.get(name, 0) for name in self.told}
        return found


@pytest.fixture
def offices(machines: Machines) -> Iterator[Callable[..., Office]]:  # noqa: F811
    made: list[Office] = []

    def make(before: str = "") -> Office:
        made.append(Office(machines(), before))
        return made[-1]

    try:
        yield make
    finally:
        for office in made:
            office.close()


def _one(conn: psycopg.Connection[Any], query: str) -> Any:
    row = conn.execute(query.encode()).fetchone()
    return row and row[0]


@pytest.mark.timeout(1200)
def test_actor_power_i2_i3_i5_nothing_that_was_reported_is_gone_or_runs_again(offices: Callable[..., Office]) -> None:
    # Given actors that are sent to, one after another
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    office = offices()
    office.work()
    for cycle in range(CYCLES):
        # When the power is cut, and comes back
        office.traffic_until_cut(chance, told=cycle % 2 == 0)
        office.power_cycle()
        # Then everything reported is there, at once
        assert office.losses() == [], f"after cut {cycle + 1}"
        with office.machine.connect(autocommit=True) as conn:
            # What was in hand at three deaths in a row is given up, which is another test's affair.
            conn.execute("update outbox.parked set deaths = least(deaths, 1)")
            # And what was committed and not yet done follows by itself, and is paid once
            office.work()
            until(partial(_one, conn, "select outbox.queue_idle('actor.default')"), "everything is done")
            runs = dict(conn.execute("select name, count(*) from effect group by name").fetchall())
            assert runs.keys() >= set(office.sent)
            assert _one(conn, "select count(*) from outbox.parked") == 0
            paid = [row[0] for row in conn.execute("select name from payment")]
            assert len(paid) == len(set(paid))
            assert set(paid) >= {name for name in office.sent if name.startswith("paid")}
            # And what was reported has not run again
            assert {name: runs[name] for name in office.told} == office.told
    assert len(office.told) >= CYCLES / 2


@pytest.mark.timeout(600)
def test_actor_power_i12_a_result_is_gone_when_the_workers_commits_do_not_wait_for_the_disk(
    offices: Callable[..., Office],
) -> None:
    office = offices(ASYNCHRONOUS)
    chance = random.Random(12)
    office.work()
    for cut in range(BITES):
        office.traffic_until_cut(chance, told=True)
        office.power_cycle()
        if found := office.losses():
            print(f"cut {cut + 1}: {found}")
            assert all(one.startswith("result of") for one in found), found
            return
        office.work()
    raise AssertionError(f"nothing was lost in {BITES} cuts")
