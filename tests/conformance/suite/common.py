"""Becomes `tests/common.py` beside dramatiq's tests: what they import from there, made anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dramatiq import Broker, Worker
from pika.credentials import PlainCredentials

RABBITMQ_USERNAME = RABBITMQ_PASSWORD = "guest"
RABBITMQ_CREDENTIALS = PlainCredentials(RABBITMQ_USERNAME, RABBITMQ_PASSWORD)


def _plain(test: Any) -> Any:
    return test


skip_in_ci = skip_on_windows = skip_on_pypy = skip_with_gevent = _plain
skip_unless_rabbit_mq = skip_unless_gevent = _plain


@contextmanager
def worker(broker: Broker, *args: Any, **kwargs: Any) -> Iterator[Worker]:
    started = Worker(broker, *args, **kwargs)
    started.start()
    try:
        yield started
    finally:
        started.stop()


__all__ = [name for name in dir() if not name.startswith("_") and name != "pytest"]
