"""Where the model of sagas takes place: participant and functions fail as they are told, and what they did is kept.

Used by `tests.model.sagas`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Saga
from outbox.errors import Unavailable
from outbox.intent import Intent
from outbox.participant import APPLIED, Outcome, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from outbox.saga.plan import Retry
from tests.fixtures.lanes import Sink
from tests.fixtures.sagas import Rig


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


class Deed(NamedTuple):
    """An effect of a step."""

    saga: str
    step: str
    undo: bool


class Truth(Sink):
    """A sink that is idempotent by intent, as participants are, and whose effects and position survive its worker."""

    keeps_position = True

    def __init__(self, fates: dict[str, str]) -> None:
        super().__init__()
        self.fates = fates
        self.down = False
        #: intent → what it did, in the order in which it happened.
        self.deeds: dict[int, Deed] = {}

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        if self.down and batch:
            raise Unavailable("the sink is down")
        outcomes: list[Outcome] = []
        failed: set[str] = set()
        for intent in batch:
            fate = self.fates.get(intent.key, "applied")
            if intent.key in failed:
                outcomes.append(Outcome(Verdict.BLOCKED))
                continue
            if fate in ("applied", "doubt: happened"):
                self.deeds.setdefault(intent.id, Deed(*intent.payload))
            outcomes.append(
                {
                    "applied": APPLIED,
                    "retry": Outcome(Verdict.RETRY, error="not now"),
                    "poison": Outcome(Verdict.POISON, error="never"),
                }.get(fate, Outcome(Verdict.IN_DOUBT, error="nobody knows"))
            )
            if fate != "applied":
                failed.add(intent.key)
        if position is not None and not failed:
            self.own = position
        return outcomes


class Site(Rig):
    """A rig whose sagas, and what fails of them, are the model's."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        with self.sessions.begin() as session:
            session.execute(sa.text("create table deed (n bigserial, saga text, step text, undo boolean)"))
        self.fates: dict[str, str] = {}
        #: Functions, and functions that make intents: step → the exception that it raises.
        self.broken: dict[str, Exception] = {}
        self.armed = ""
        self.reached: Counter[str] = Counter()
        self.sink = Truth(self.fates)
        self.sagas = self._define()
        self.deploy(*self.sagas.values())

    def sinker_made(self) -> None:
        """Have a worker of the sink, whose retries take a while."""
        if self._sink is None:
            self._sink = self.reader(backoff=Backoff(first=20.0, limit=20.0, attempts=4))

    def hit(self, name: str) -> None:
        """What a failpoint does here."""
        if name == self.armed:
            self.reached[name] += 1
            raise Killed

    def later(self, seconds: float) -> None:
        assert self.engine  # its connection is told the time too
        super().later(seconds)

    # ------------------------------------------------------------------------------------------ the sagas

    def _intent(self, saga: Saga[Any], name: str, **options: Any) -> None:
        def make(undo: bool) -> Callable[[Any], Any]:
            def maker(run: Any) -> Any:
                if name in self.broken and not undo:
                    raise self.broken[name]
                return run.emit("sink", "put", name, [str(run.id), name, undo])

            return maker

        step = saga.intent(name=name, **options)(make(False))
        if options.get("kind", "compensatable") == "compensatable":
            step.undo(make(True))

    def _function(self, saga: Saga[Any], name: str, **options: Any) -> None:
        def make(undo: bool) -> Callable[[Session, Any], None]:
            def function(session: Session, run: Any) -> None:
                values = {"saga": str(run.id), "step": name, "undo": undo}
                session.execute(sa.text("insert into deed (saga, step, undo) values (:saga, :step, :undo)"), values)
                if name in self.broken:
                    raise self.broken[name]

            return function

        step = saga.function(name=name, **options)(make(False))
        if options.get("kind", "compensatable") == "compensatable":
            step.undo(make(True))

    def _define(self) -> dict[str, Saga[Any]]:
        def lock(value: dict[str, Any]) -> list[str]:
            return [value["lock"]]

        row: Saga[Any] = Saga("row", dict)
        self._intent(row, "a")
        self._function(row, "f", retry=Retry(attempts=3, first=20.0))
        self._intent(row, "p", kind="pivot")
        self._intent(row, "r", kind="retriable", retry=Retry(attempts=3, first=20.0))
        diamond: Saga[Any] = Saga("diamond", dict)
        self._intent(diamond, "a", after=())
        self._intent(diamond, "b", after="a", timeout=900.0)
        self._function(diamond, "f", after="a")
        self._intent(diamond, "c", after=("b", "f"))
        asks: Saga[Any] = Saga("asks", dict)
        self._intent(asks, "a")
        asks.signal("go", timeout=120.0)
        self._function(asks, "p-f", kind="pivot")
        self._function(asks, "r-f", kind="retriable")
        locked: Saga[Any] = Saga("locked", dict, locks=lock, lock_timeout=120.0)
        self._intent(locked, "a")
        locked.delay("sleep", 30.0)
        self._function(locked, "f")
        kid: Saga[Any] = Saga("kid", dict, locks=lock, lock_timeout=120.0)
        self._intent(kid, "b")
        self._function(kid, "f")
        family: Saga[Any] = Saga("family", dict)
        self._intent(family, "a")
        step = family.child(kid, name="sub")(lambda run: run.input)

        @step.undo
        def unsub(session: Session, run: Any) -> None:
            values = {"saga": str(run.id)}
            session.execute(sa.text("insert into deed (saga, step, undo) values (:saga, 'sub', true)"), values)

        self._intent(family, "c")
        return {saga.name: saga for saga in (row, diamond, asks, locked, kid, family)}

    def deeds(self) -> list[Deed]:
        """Everything that was done. Of one step, in order."""
        rows = self.admin.execute("select saga, step, undo from deed order by n").fetchall()
        return [*self.sink.deeds.values(), *(Deed(*row) for row in rows)]  # type: ignore[attr-defined]
