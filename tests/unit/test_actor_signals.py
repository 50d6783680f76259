"""Signals: who of a broker's middleware hears what, as with dramatiq's own brokers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Middleware, SkipMessage

from outbox.actor import OutboxBroker

MESSAGE: dramatiq.Message[None] = dramatiq.Message("q", "a", (), {}, {})


class Hears(Middleware):
    """Notes what it hears, and fails if it is told to."""

    def __init__(self, name: str, heard: list[str], fails: Exception | None = None) -> None:
        self.name = name
        self.heard = heard
        self.fails = fails

    def _note(self, what: str) -> None:
        self.heard.append(f"{self.name} {what}")
        if self.fails is not None:
            raise self.fails

    def before_ack(self, broker: dramatiq.Broker, message: Any) -> None:
        self._note("before")

    def after_ack(self, broker: dramatiq.Broker, message: Any) -> None:
        self._note("after")


class Deaf(Middleware):
    """Does nothing."""


class Inherits(Hears):
    """Its hooks are those of its base."""


def heard_by(make: Callable[[list[Middleware]], dramatiq.Broker]) -> list[str]:
    """What the middleware of a broker hears in a life of changes."""
    heard: list[str] = []
    broker = make([Deaf(), Hears("first", heard), Deaf(), Inherits("second", heard, RuntimeError("lost"))])
    broker.emit_before("ack", MESSAGE)
    broker.emit_after("ack", MESSAGE)
    # Some come later
    late = Hears("late", heard)
    broker.add_middleware(late, before=Hears)
    broker.emit_before("ack", MESSAGE)
    # One is given a hook of its own, one refuses, one is told of what its kind doesn't know
    special = Deaf()
    vars(special)["before_ack"] = lambda _broker, _message: heard.append("special before")
    broker.add_middleware(special)
    broker.add_middleware(Hears("refuses", heard, SkipMessage("no")))
    with pytest.raises(SkipMessage):
        broker.emit_before("ack", MESSAGE)
    broker.emit_after("ack", MESSAGE)
    broker.emit_after("nonsense", MESSAGE)
    # Some go
    broker.middleware.remove(late)
    broker.emit_after("ack", MESSAGE)
    return heard


def test_signals_reach_the_middleware_that_dramatiqs_own_brokers_tell() -> None:
    heard = heard_by(lambda middleware: OutboxBroker(middleware=middleware))
    assert heard == heard_by(StubBroker)
    assert heard[:4] == ["first before", "second before", "second after", "first after"]
    assert "special before" in heard


def test_signals_failure_of_one_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    broker = OutboxBroker(middleware=[Hears("fails", heard, RuntimeError("lost")), Hears("second", heard)])
    broker.emit_before("ack", MESSAGE)
    assert heard == ["fails before", "second before"]
    assert "Unexpected failure in before_ack" in caplog.text
