"""`actor-send`, `actor-retry`, `actor-due`: what actors cost off the straight path.

`actor-send` is a mapped row and a message in one transaction, against the row alone; and sends by themselves, each
durable when it returns. `actor-retry` are messages that ask to be run again once, at once. `actor-due` are a thousand
delayed messages, all due at the same time: how late they begin. Redis is beside each, where there is one.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import dramatiq
import sqlalchemy as sa
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy.orm import sessionmaker

from tests.bench import redis
from tests.bench.actor import on_log, rate, run
from tests.bench.actors import on_log as broker_on_log
from tests.bench.actors import sessions_of
from tests.bench.figure import Bar, Figure
from tests.bench.latency import percentile
from tests.bench.orm import BLOCK, Base, Note
from tests.bench.pair import compare
from tests.bench.rival import NotInstalled
from tests.bench.site import Site

RETRIES = 3000
"""Messages of a turn."""

DUE = 1000
"""Messages that are due at the same time."""


def _nothing(_number: int) -> None:
    """What is sent and never run."""


@contextmanager
def _redis(site: Site) -> Iterator[str | None]:
    """Its URL, or None where it can't be had."""
    try:
        with redis.server(site) as url:
            yield url
    except NotInstalled as error:
        print(error, file=sys.stderr)
        yield None


def send(site: Site, *, quick: bool) -> Iterator[Figure]:
    """In a transaction, and without one."""
    app = site.server.url("app", site.database())
    broker = broker_on_log(app, app)
    hooked = sessions_of(broker)
    engine = hooked.kw["bind"]
    plain = sessionmaker(engine)
    actor = dramatiq.actor(broker=broker, actor_name="nothing")(_nothing)
    numbers = itertools.count(1)

    def with_message() -> float:
        return _timed(lambda number: _row(hooked, number, actor))

    def without() -> float:
        return _timed(lambda number: _row(plain, number, None))

    def _timed(work: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for number in itertools.islice(numbers, BLOCK):
            work(number)
        return (time.perf_counter() - start) / BLOCK

    try:
        Base.metadata.create_all(engine)
        pair = compare(with_message, without, pairs=15 if quick else 61)
        alone = 1 / median(_timed(actor.send) for _ in range(10 if quick else 40))
        with _redis(site) as url:
            if url is not None:
                other = dramatiq.actor(broker=RedisBroker(url=url), actor_name="nothing")(_nothing)
                theirs = 1 / median(_timed(other.send) for _ in range(10 if quick else 40))
    finally:
        broker.close()
        engine.dispose()
    yield Figure("actor-send.ratio", pair.ratio, "ratio of time", Bar("<=", 1.3))
    yield Figure("actor-send.with", pair.ours * 1000, "ms/transaction")
    yield Figure("actor-send.without", pair.theirs * 1000, "ms/transaction")
    yield Figure("actor-send.alone", alone, "sends/s")
    if url is not None:
        yield Figure("actor-send.redis", theirs, "sends/s")


def _row(sessions: sessionmaker[sa.orm.Session], number: int, actor: dramatiq.Actor[..., None] | None) -> None:
    with sessions.begin() as session:
        session.add(Note(title=f"Note {number}", text="A line of it."))
        session.flush()
        if actor is not None:
            actor.send(number)


def retry(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Messages per second, each run twice."""
    pairs = 3 if quick else 7
    with on_log(site) as url, _redis(site) as theirs:
        ours = partial(rate, "retry", "outbox", url, RETRIES)
        if theirs is None:
            yield Figure("actor-retry.ours", median(ours() for _ in range(pairs)), "messages/s")
            return
        pair = compare(ours, partial(rate, "retry", "redis", theirs, RETRIES), pairs=pairs, warm=False)
    yield Figure("actor-retry.ratio", pair.ratio, "ratio of messages/s")
    yield Figure("actor-retry.ours", pair.ours, "messages/s")
    yield Figure("actor-retry.redis", pair.theirs, "messages/s")


def due(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Milliseconds by which messages begin after their time."""
    turns = 1 if quick else 5
    with on_log(site) as ours, _redis(site) as theirs:
        for name, url in (("outbox", ours), ("redis", theirs)):
            if url is not None:
                late = [list(map(float, run("due", name, url, DUE).split())) for _ in range(turns)]
                yield Figure(f"actor-due.{name}.first", median(one[0] for one in late), "ms")
                yield Figure(f"actor-due.{name}.p50", median(percentile(one, 0.5) for one in late), "ms")
                yield Figure(f"actor-due.{name}.last", median(one[-1] for one in late), "ms")
