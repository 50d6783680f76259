"""Becomes `tests/conftest.py` beside dramatiq's tests: every broker fixture of theirs is an `OutboxBroker`.

What a test needs beyond `dramatiq.Broker` is here and not in the product: `join(fail_fast=…)` raises what an actor
raised, and `dead_letters` says what failed. A test that is left out must fail, and must exist: see left_out.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq.broker import MessageProxy
from dramatiq.rate_limits.backends import StubBackend as StubRateLimiterBackend
from dramatiq.results.backends import StubBackend

from outbox.actor import OutboxBroker

_HERE = Path(__file__).parent

_LEFT_OUT: dict[str, str] = {}
for _line in (_HERE / "left_out.txt").read_text(encoding="utf-8").splitlines():
    if _line.strip() and not _line.startswith("#"):
        _name, _, _reason = _line.partition("  ")
        assert _reason.strip(), f"{_name} is left out without a reason"
        _LEFT_OUT[_name] = _reason.strip()

collect_ignore = [name for name in _LEFT_OUT if "::" not in name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = {item.nodeid.removeprefix("tests/") for item in items}
    found |= {path.name for path in _HERE.glob("test_*.py")}
    if not config.getoption("keyword") and (unknown := _LEFT_OUT.keys() - found):
        pytest.exit(f"left out, but there is no such test: {', '.join(sorted(unknown))}", returncode=3)
    for item in items:
        if reason := _LEFT_OUT.get(item.nodeid.removeprefix("tests/")):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


class Broker(OutboxBroker):
    """The broker under test, with what the StubBroker has for tests beside."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dead_letters_by_queue: defaultdict[str, list[Any]] = defaultdict(list)

    @property
    def dead_letters(self) -> list[Any]:
        return [one for letters in self.dead_letters_by_queue.values() for one in letters]

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "nack":
            message: MessageProxy = args[0]
            self.dead_letters_by_queue[message.queue_name].append(message._exception or Exception("it failed"))
        super().emit_before(signal, *args, **kwargs)

    def join(self, queue_name: str, *, timeout: int | None = None, fail_fast: bool = True) -> None:
        super().join(queue_name, timeout=timeout)
        if fail_fast:
            for error in self.dead_letters_by_queue[queue_name]:
                raise error


def _broker() -> Iterator[Broker]:
    broker = Broker()
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.flush_all()
    broker.emit_before("worker_shutdown", None) if False else None
    broker.close()


def _worker(broker: OutboxBroker) -> Iterator[Worker]:
    worker = Worker(broker, worker_timeout=100, worker_threads=32)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def stub_broker() -> Iterator[Broker]:
    yield from _broker()


@pytest.fixture
def redis_broker() -> Iterator[Broker]:
    yield from _broker()


@pytest.fixture
def rabbitmq_broker() -> Iterator[Broker]:
    yield from _broker()


@pytest.fixture
def stub_worker(stub_broker: Broker) -> Iterator[Worker]:
    yield from _worker(stub_broker)


@pytest.fixture
def redis_worker(redis_broker: Broker) -> Iterator[Worker]:
    yield from _worker(redis_broker)


@pytest.fixture
def rabbitmq_worker(rabbitmq_broker: Broker) -> Iterator[Worker]:
    yield from _worker(rabbitmq_broker)


@pytest.fixture
def result_backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
def redis_result_backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
def rate_limiter_backend() -> StubRateLimiterBackend:
    return StubRateLimiterBackend()


@pytest.fixture
def start_cli() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """dramatiq's command line, as they start it: in the folder above `tests`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(broker: str, *, extra_args: list[str] | None = None, **more: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dramatiq", broker, *(extra_args or [])], cwd=_HERE.parent, env=os.environ, **more
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait()
