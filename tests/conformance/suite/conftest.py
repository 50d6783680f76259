"""Becomes `tests/conftest.py` beside dramatiq's tests: every broker fixture of theirs is an `OutboxBroker`.

What a test needs beyond `dramatiq.Broker` is here and not in the product: `join(fail_fast=…)` raises what an actor
raised, and `dead_letters` says what failed. A test that is left out must fail, and must exist: see left_out.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq.broker import MessageProxy

from outbox.actor import OutboxBroker, OutboxLimits, OutboxResults

_HERE = Path(__file__).parent

_LEFT_OUT: dict[str, str] = {}
for _line in (_HERE / "left_out.txt").read_text(encoding="utf-8").splitlines():
    if _line.strip() and not _line.startswith("#"):
        _name, _, _reason = _line.partition("  ")
        assert _reason.strip(), f"{_name} is left out without a reason"
        _LEFT_OUT[_name] = _reason.strip()

# On SIGHUP dramatiq starts itself anew, as `python`.
_ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

collect_ignore = [name for name in _LEFT_OUT if "::" not in name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = {item.nodeid.removeprefix("tests/") for item in items}
    found |= {path.name for path in _HERE.glob("test_*.py")}
    whole = config.args == ["tests"] and not config.getoption("keyword")
    if whole and (unknown := _LEFT_OUT.keys() - found):
        pytest.exit(f"left out, but there is no such test: {', '.join(sorted(unknown))}", returncode=3)
    for item in items:
        if reason := _LEFT_OUT.get(item.nodeid.removeprefix("tests/")):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            # One that waits for what can't happen has failed, too.
            item.add_marker(pytest.mark.timeout(20))


_FAILED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and report.nodeid not in _FAILED:
        _FAILED.append(report.nodeid)


def pytest_sessionfinish() -> None:
    """For those that are given another chance."""
    (_HERE.parent / "failed.txt").write_text("\n".join(_FAILED), encoding="utf-8")


class Broker(OutboxBroker):
    """The broker under test, with what dramatiq's brokers have for tests beside."""

    def __init__(self, *, fail_fast: bool) -> None:
        # A message whose actor isn't there fails at once, as with dramatiq's brokers.
        super().__init__(missing=0)
        self.dead_letters: list[MessageProxy] = []
        self._fail_fast = fail_fast
        self._failed: list[tuple[str, BaseException]] = []

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "nack":
            message: MessageProxy = args[0]
            self.dead_letters.append(message)
            self._failed.append((message.queue_name, message._exception or Exception("it failed")))
        super().emit_before(signal, *args, **kwargs)

    def join(
        self,
        queue_name: str,
        *,
        timeout: int | None = None,
        fail_fast: bool | None = None,
        min_successes: int = 0,
        idle_time: int = 0,
    ) -> None:
        # How often, and how long, RabbitMQ has to be asked: the log knows at once.
        super().join(queue_name, timeout=timeout)
        failed, self._failed = self._failed, []
        for queue, error in failed:
            if queue == queue_name and (self._fail_fast if fail_fast is None else fail_fast):
                raise error


def _broker(*, fail_fast: bool) -> Iterator[Broker]:
    broker = Broker(fail_fast=fail_fast)
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.flush_all()
    broker.close()


def _worker(broker: OutboxBroker) -> Iterator[Worker]:
    worker = Worker(broker, worker_timeout=100, worker_threads=32)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def stub_broker() -> Iterator[Broker]:
    yield from _broker(fail_fast=True)


@pytest.fixture
def redis_broker() -> Iterator[Broker]:
    yield from _broker(fail_fast=False)


@pytest.fixture
def rabbitmq_broker() -> Iterator[Broker]:
    yield from _broker(fail_fast=False)


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
def result_backend(stub_broker: Broker) -> OutboxResults:
    return OutboxResults(stub_broker)


@pytest.fixture
def redis_result_backend(stub_broker: Broker) -> OutboxResults:
    return OutboxResults(stub_broker)


@pytest.fixture
def rate_limiter_backend() -> Iterator[OutboxLimits]:
    broker = OutboxBroker()
    # What an earlier chance has counted would count again: they use the same keys.
    zero = "select outbox.tally_change(key, -value, null, null, 0, null) from outbox.tally"
    broker.run(lambda conn: conn.execute(zero))
    yield OutboxLimits(broker)
    broker.close()


@pytest.fixture
def start_cli() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """dramatiq's command line, as they start it: in the folder above `tests`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(broker: str, *, extra_args: list[str] | None = None, **more: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dramatiq", broker, *(extra_args or [])], cwd=_HERE.parent, env=_ENVIRONMENT, **more
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait()
