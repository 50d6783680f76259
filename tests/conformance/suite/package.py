"""Becomes `tests/__init__.py` beside dramatiq's tests: every broker that they make there is one on the log.

Also in the worker processes that dramatiq's command line starts: they import this package, and no conftest.
"""

from __future__ import annotations

from typing import Any

import dramatiq.brokers.redis

from outbox.actor import OutboxBroker

_RedisBroker = dramatiq.brokers.redis.RedisBroker


def _on_the_log(*args: Any, **kwargs: Any) -> Any:
    # What is about Redis itself (an address, a client) is made as asked, and fails as it must without one.
    return _RedisBroker(*args, **kwargs) if args or set(kwargs) - {"middleware"} else OutboxBroker(**kwargs)


dramatiq.brokers.redis.RedisBroker = _on_the_log  # type: ignore[assignment,misc]
