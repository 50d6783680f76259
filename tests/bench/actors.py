"""A worker of dramatiq with eight threads, and actors that do nothing: on the log, on Redis, or in memory.

    python -m tests.bench.actors rate BROKER URL COUNT     send so many, then work them off: actors/s
    python -m tests.bench.actors retry BROKER URL COUNT    the same, but each asks to be run again once: messages/s
    python -m tests.bench.actors due BROKER URL COUNT      so many that are due at one time: how late each begins, in ms
    python -m tests.bench.actors wait BROKER URL COUNT     until SIGTERM, with so many queues more that are empty: a
                                                           line for each actor, with its name and when it began

BROKER is `outbox`, `redis` or `stub`. They differ in nothing else: each is a broker with dramatiq's own middleware, in
a process of its own with one `dramatiq.Worker`. What it takes to send, to connect and to start is not in a rate: the
time runs from the start of actor number `WARM` to the start of the last one, and each must have run.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import dramatiq
import sqlalchemy as sa
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from sqlalchemy.orm import sessionmaker

from outbox import Outbox
from outbox.actor import OutboxBroker
from outbox.settings import Settings

THREADS = 8

WARM = 500
"""Actors that have run before the time begins."""

BATCH = 1000
"""Messages that are sent in one transaction, where there is one."""

PATIENCE = 120.0
"""Seconds for all to run."""

AHEAD = 6.0
"""Seconds from now to the time at which delayed messages are due."""


def settings(url: str) -> Settings:
    """`url`: what to connect as, and where."""
    return Settings(url, None, None, "smtp://127.0.0.1:1")


def on_log(app: str, worker: str) -> OutboxBroker:
    """A broker whose sends may commit with a session."""
    outbox = Outbox(sessionmaker(sa.create_engine(settings(app).sqlalchemy_url)), settings(app))
    return OutboxBroker(outbox, settings=settings(app), worker=settings(worker))


def _broker(name: str, url: str) -> dramatiq.Broker:
    if name == "outbox":
        return on_log(url.replace("//actor@", "//app@"), url)
    return RedisBroker(url=url) if name == "redis" else StubBroker()


def _transaction(broker: dramatiq.Broker) -> AbstractContextManager[object]:
    """What sends commit with: on the log one for many, elsewhere there is none."""
    return sessions_of(broker).begin() if isinstance(broker, OutboxBroker) else nullcontext()


def sessions_of(broker: OutboxBroker) -> sessionmaker[sa.orm.Session]:
    """Those whose transactions its sends commit with."""
    assert broker.outbox is not None
    assert isinstance(broker.outbox.sessions, sessionmaker)
    return broker.outbox.sessions


class Tally:
    """Counts what has run."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._numbers = itertools.count(1)
        self._ran = bytearray(count)
        self._began = self._ended = 0.0
        self._done = threading.Event()

    def run(self, number: int) -> None:
        """The actor."""
        self._ran[number] = 1
        at = next(self._numbers)
        if at == WARM:
            self._began = time.perf_counter()
        elif at == self._count:
            self._ended = time.perf_counter()
            self._done.set()

    def rate(self) -> float:
        """Wait for all. → actors per second."""
        if not self._done.wait(PATIENCE):
            raise RuntimeError(f"{sum(self._ran):,} actors ran of {self._count:,} within {PATIENCE:.0f} s")
        if not all(self._ran):
            raise RuntimeError(f"{self._count - sum(self._ran):,} messages were not run, others more than once")
        return (self._count - WARM) / (self._ended - self._began)


def _send(broker: dramatiq.Broker, actor: dramatiq.Actor[..., None], count: int, at: float | None = None) -> None:
    for first in range(0, count, BATCH):
        with _transaction(broker):
            for number in range(first, min(count, first + BATCH)):
                delay = None if at is None else round((at - time.time()) * 1000)
                actor.send_with_options(args=(number,), delay=delay)


@contextmanager
def _working(broker: dramatiq.Broker) -> Iterator[None]:
    worker = dramatiq.Worker(broker, worker_threads=THREADS)
    worker.start()
    try:
        yield
    finally:
        worker.stop()
        broker.close()


def rate(broker: dramatiq.Broker, count: int) -> float:
    """Send so many, and work them off. → actors per second."""
    tally = Tally(count)
    _send(broker, dramatiq.actor(broker=broker, actor_name="nothing")(tally.run), count)
    with _working(broker):
        return tally.rate()


def retry(broker: dramatiq.Broker, count: int) -> float:
    """Send so many that ask to be run again at once, and work them off. → messages per second."""
    tally = Tally(count)
    tried = bytearray(count)

    def again(number: int) -> None:
        if not tried[number]:
            tried[number] = 1
            raise dramatiq.Retry(delay=0)
        tally.run(number)

    _send(broker, dramatiq.actor(broker=broker, actor_name="again")(again), count)
    with _working(broker):
        return tally.rate()


def due(broker: dramatiq.Broker, count: int) -> list[float]:
    """Send so many for one time. → milliseconds by which each began later, in order."""
    at = time.time() + AHEAD
    late: list[float] = []

    def later(_number: int) -> None:
        late.append((time.time() - at) * 1000)

    actor = dramatiq.actor(broker=broker, actor_name="later")(later)
    with _working(broker):
        _send(broker, actor, count, at)
        if time.time() > at - AHEAD / 2:
            raise RuntimeError("it took too long to send them: some were due before all were there")
        deadline = at + PATIENCE
        while len(late) < count:
            if time.time() > deadline:
                raise RuntimeError(f"{len(late):,} actors ran of {count:,} within {PATIENCE:.0f} s")
            time.sleep(0.05)
    return sorted(late)


def wait(broker: dramatiq.Broker, queues: int) -> None:
    """Run what comes, until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    dramatiq.actor(broker=broker, actor_name="begins")(_begins)
    for number in range(queues):
        dramatiq.actor(broker=broker, actor_name=f"idle_{number}", queue_name=f"idle_{number}")(_begins)
    with _working(broker):
        print("ready", flush=True)
        stop.wait()


def _begins(name: str) -> None:
    now = time.monotonic()
    sys.stdout.write(f"{name} {now}\n")


def main(what: str, name: str, url: str, number: str) -> None:
    """As the module says."""
    count = int(number)
    broker = _broker(name, url)
    dramatiq.set_broker(broker)
    match what:
        case "rate":
            print(rate(broker, count))
        case "retry":
            print(retry(broker, count))
        case "due":
            print(*due(broker, count))
        case _:
            wait(broker, count)


if __name__ == "__main__":
    main(*sys.argv[1:])
