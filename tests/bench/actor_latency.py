"""`actor-latency`, `actor-queues`: from `send()` to the start of the actor, while the system is idle; Redis beside it.

Everything is a process of its own, as in production: the clock, a worker with eight threads, and this one, which sends
one message now and then, outside of a transaction. A latency begins when `send()` has returned, and the message is
durable; it ends when the actor begins. Both brokers are sent to in turns, by the same process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import dramatiq
import psycopg
from dramatiq.brokers.redis import RedisBroker

from outbox.actor import OutboxBroker
from tests.bench import redis
from tests.bench.actors import settings
from tests.bench.figure import Bar, Figure
from tests.bench.latency import PATIENCE, PAUSE, WARM, percentile, process
from tests.bench.rival import NotInstalled
from tests.bench.site import Site

QUEUES = 50
"""Queues more."""

_CLAIMED = """
select count(distinct target), count(distinct target) filter (where claimed)
  from (select target, bool_and(owner is not null) as claimed from outbox.lane
         where starts_with(target, 'actor.') group by target) as queue
"""


def _sends(_name: str) -> None:
    """Stands for the actor of the worker."""


class Side:
    """A broker, its worker, and when what was sent."""

    def __init__(self, broker: dramatiq.Broker, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            raise RuntimeError("the worker did not start: see what it said above")
        self._broker, self._worker = broker, worker
        self._actor = dramatiq.actor(broker=broker, actor_name="begins")(_sends)
        self.pid = worker.pid
        self._sent: dict[str, float] = {}
        self.sends: list[float] = []

    def send(self, number: int) -> None:
        """One message; those below zero are not counted."""
        before = time.monotonic()
        self._actor.send(str(number))
        after = time.monotonic()
        if number >= 0:
            self._sent[str(number)] = after
            self.sends.append((after - before) * 1000)

    def latencies(self) -> list[float]:
        """End the worker. → milliseconds, in order."""
        time.sleep(PAUSE[1])
        self._worker.terminate()
        output = self._worker.communicate(timeout=PATIENCE)[0]
        self._broker.close()
        begun = {name: float(at) for name, at in map(str.split, output.splitlines())}
        return sorted(max(0.0, begun[name] - at) * 1000 for name, at in self._sent.items())


@contextmanager
def _sides(site: Site, queues: int) -> Iterator[dict[str, Side]]:
    """`queues`: more of them, in which nothing is."""
    database = site.database()
    worker = site.server.url("actor", database)
    with ExitStack() as stack:
        stack.enter_context(process(site, database, "outbox", "work", "clock"))
        program = "tests.bench.actors", "wait"
        started = stack.enter_context(process(site, database, *program, "outbox", worker, str(queues)))
        sides = {"outbox": Side(OutboxBroker(settings=settings(site.server.url("app", database))), started)}
        with psycopg.connect(site.server.url(database=database), autocommit=True) as admin:
            _until_claimed(admin, 1 + queues)
        try:
            url = stack.enter_context(redis.server(site))
            started = stack.enter_context(process(site, database, *program, "redis", url, "0"))
            sides["redis"] = Side(RedisBroker(url=url), started)
        except NotInstalled as error:
            print(error, file=sys.stderr)
        yield sides


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Percentiles in milliseconds."""
    with _sides(site, queues=0) as sides:
        latencies = _latencies(sides, 30 if quick else 200)
    ours = latencies["outbox"]
    yield Figure("actor-latency.p50", percentile(ours, 0.5), "ms", Bar("<=", 10))
    yield Figure("actor-latency.p99", percentile(ours, 0.99), "ms", Bar("<=", 40))
    yield Figure("actor-latency.max", ours[-1], "ms")
    yield Figure("actor-latency.send", median(sides["outbox"].sends), "ms")
    if "redis" in latencies:
        yield Figure("actor-latency.redis.p50", percentile(latencies["redis"], 0.5), "ms")
        yield Figure("actor-latency.redis.p99", percentile(latencies["redis"], 0.99), "ms")


def queues(site: Site, *, quick: bool) -> Iterator[Figure]:
    """With fifty queues more, in which nothing is; and what they cost while nothing happens."""
    with _sides(site, QUEUES) as sides:
        worker = sides["outbox"].pid
        start, before = time.monotonic(), _seconds(worker)
        time.sleep(5 if quick else 20)
        idle = (_seconds(worker) - before) / (time.monotonic() - start)
        ours = _latencies({"outbox": sides["outbox"]}, 30 if quick else 100)["outbox"]
    yield Figure("actor-queues.idle", idle * 100, "% of a core in the worker")
    yield Figure("actor-queues.p50", percentile(ours, 0.5), "ms")
    yield Figure("actor-queues.p99", percentile(ours, 0.99), "ms")


def _latencies(sides: dict[str, Side], samples: int) -> dict[str, list[float]]:
    rng = random.Random(1)
    for number in range(-WARM, samples):
        for side in sides.values():
            time.sleep(rng.uniform(*PAUSE))
            side.send(number)
    return {which: side.latencies() for which, side in sides.items()}


def _until_claimed(admin: psycopg.Connection[tuple[int, ...]], queues: int) -> None:
    """Until all lanes of so many queues have an owner."""
    deadline = time.monotonic() + 4 * PATIENCE
    while admin.execute(_CLAIMED).fetchone() != (queues, queues):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the lanes of {queues} queues are not claimed within {4 * PATIENCE:.0f} s")
        time.sleep(0.1)


def _seconds(pid: int) -> float:
    """Of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
