"""Rehearses one case of a saga's crash matrix (`outbox.testing.matrix`): everything in one process, one step at a time.

Found through the entry point `outbox.testing`. The clock, the engine and the participants' readers are the real ones;
the participants and the step functions are wrapped so that one thing goes wrong, once. A worker that "dies" is dropped
without a word, like one that was killed: its transaction is gone, its lease has run out.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker

from outbox import Outbox
from outbox import lane as lanes
from outbox.database import connect
from outbox.errors import Permanent
from outbox.intent import Intent
from outbox.participant import Outcome, Participant, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from outbox.saga.plan import Act
from outbox.saga.registry import Definitions, register
from outbox.saga.states import ENDED
from outbox.testing.matrix import Mishap, Stage
from outbox.testing.subject import Broken
from workers.clock import Clock
from workers.drive import Drive
from workers.engine import Engine
from workers.reader import Reader
from workers.stepwork import Came, Stepwork

ROUNDS = 2000
"""Rounds of all readers after which a saga that has not ended never will."""

_SOON = Backoff(first=0.001, limit=0.001)


class _Killed(BaseException):
    """The worker dies here."""


class Rehearsal:
    """One run of a saga in which one thing goes wrong."""

    def __init__(self, stage: Stage, mishap: Mishap) -> None:
        self.stage = stage
        self.mishap = mishap
        #: Per step, in order: "do" or "undo", each time that it took effect.
        self.effects: dict[str, list[str]] = {}
        #: Whether what is to go wrong still is.
        self.armed = mishap.what != "nothing"
        self.definitions: Definitions = {}
        register(self.definitions, mishap.saga)
        self._conns: list[psycopg.Connection[Any]] = []
        self._readers: dict[str, Reader] = {}
        self._ahead = timedelta(0)
        self.look = self._connect("look")

    def _connect(self, name: str) -> psycopg.Connection[Any]:
        conn = connect(self.stage.settings.database, name=f"rehearsal {name}")
        self._conns.append(conn)
        self._set_clock(conn)
        return conn

    def _set_clock(self, conn: psycopg.Connection[Any]) -> None:
        moment = (datetime.now().astimezone() + self._ahead).isoformat() if self._ahead else ""
        conn.execute("select set_config('outbox.fake_now', %s, false)", (moment,))

    # ------------------------------------------------------------------------------------------ one run

    def run(self) -> str:
        """→ how the saga ended."""
        owned = lanes.claim(self._connect("clock"), "clock", 0, owner=uuid.uuid4(), ttl=3600)
        if owned is None:
            raise Broken("a clock is running on this database: a rehearsal needs one to itself")
        clock = Clock(self._conns[-1], owned)
        saga = self._start()
        state = ""
        for _ in range(ROUNDS):
            moved = clock.step()
            for target in ("saga", *self.stage.participants):
                moved = self._step(target) or moved
            self._provoke(saga)
            state = self._state(saga)
            if state in ENDED and not moved:
                break
            if not moved:
                self._help(saga)
        self._check(state)
        return state

    def _start(self) -> UUID:
        engine = sa.create_engine(self.stage.settings.sqlalchemy_url, poolclass=sa.NullPool)
        sessions = sessionmaker(engine)
        Outbox(sessions, self.stage.settings)
        with sessions.begin() as session:
            return self.mishap.saga.start(session, self.stage.input)

    def _step(self, target: str) -> bool:
        try:
            return self._reader(target).step()
        except _Killed:
            reader = self._readers.pop(target)
            with suppress(Exception):
                reader.participant.close()
            reader.conn.close()
            self._conns.remove(reader.conn)
            self.look.execute(
                "update outbox.lane set lease_until = '-infinity' where target = %s and owner is not null", (target,)
            )
            return True

    def _reader(self, target: str) -> Reader:
        if target not in self._readers:
            conn = self._connect(target)
            lane = lanes.claim(conn, target, 0, owner=uuid.uuid4(), ttl=3600)
            if lane is None:
                raise Broken(f"a worker of {target!r} is running on this database: a rehearsal needs one to itself")
            made: Participant
            made = _RehearsedEngine(self) if target == "saga" else _Rehearsed(self, self.stage.participants[target]())
            reader = Reader(conn, lane, made, backoff=_SOON)
            reader.open()
            self._readers[target] = reader
        reader = self._readers[target]
        reader._parked_at = reader._blocked_at = -60.0  # noqa: SLF001 - time is virtual here
        return reader

    def _state(self, saga: UUID) -> str:
        row = self.look.execute("select state from outbox.saga where id = %s", (saga,)).fetchone()
        return "" if row is None else str(row[0])

    def at(self, intent: int) -> tuple[str, bool] | None:
        """The step whose newest try this intent is, and whether it is its compensation."""
        row = self.look.execute("select step, state from outbox.saga_step where intent = %s", (intent,)).fetchone()
        return None if row is None else (str(row[0]), row[1] == "undoing")

    def _provoke(self, saga: UUID) -> None:
        """Cancel, once the step is under way."""
        if self.armed and self.mishap.what == "cancel":
            row = self.look.execute(
                "select 1 from outbox.saga_step where saga = %s and step = %s and state <> 'pending'",
                (saga, self.mishap.step),
            ).fetchone()
            if row:
                self.armed = False
                self._emit(saga, "cancel", '{"reason": "a rehearsal"}')

    def _emit(self, saga: UUID, action: str, payload: str) -> None:
        self.look.execute("select outbox.emit('saga', %s, %s, %s)", (action, str(saga), payload))

    def _help(self, saga: UUID) -> None:
        """Nothing moves: give the signals that are waited for, or let time pass to the next timer."""
        rows = self.look.execute(
            "select step from outbox.saga_step where saga = %s and state = 'running' and intent is null", (saga,)
        ).fetchall()
        waited = {name for (name,) in rows} & {n.name for n in self.mishap.saga.plan.nodes if n.act is Act.SIGNAL}
        if self.mishap.step in waited and self.wrong(self.mishap.step, "time out"):
            waited.discard(self.mishap.step)
            self.armed = False
        for name in waited:
            self._emit(saga, "signal", f'{{"name": "{name}"}}')
        if waited:
            return
        row = self.look.execute(
            "select min(due) - outbox.now() from (select due from outbox.saga_timer union all "
            "select retry_at from outbox.parked) as next"
        ).fetchone()
        if row is not None and row[0] is not None:
            self._ahead += max(row[0], timedelta(0)) + timedelta(seconds=1)
            for conn in self._conns:
                self._set_clock(conn)
            engine = self._readers["saga"].participant
            assert isinstance(engine, _RehearsedEngine)  # noqa: S101 - it is made here
            engine.set_clock()

    # ------------------------------------------------------------------------------------------ the promise

    def _check(self, state: str) -> None:
        if state not in ENDED:
            raise Broken(f"{self.mishap}: the saga has not ended, it is {state or 'not started'}")
        if self.armed:
            raise Broken(f"{self.mishap}: what was to go wrong never came up")
        for node in self.mishap.saga.plan.nodes:
            done = self.effects.get(node.name, [])
            if state == "completed" and node.has_effect and node.act is not Act.CHILD and done[-1:] != ["do"]:
                raise Broken(f"{self.mishap}: completed, and step {node.name!r} has {done or 'no effect'}")
            if state == "compensated" and done and node.undo is not None and done[-1] == "do":
                raise Broken(f"{self.mishap}: compensated, and step {node.name!r} is not undone: {done}")
            if state == "compensated" and done and node.undo is None:
                raise Broken(f"{self.mishap}: compensated, and step {node.name!r} can't be undone: {done}")
        parked = self.look.execute("select count(*) from outbox.parked").fetchone()
        if parked != (0,):
            raise Broken(f"{self.mishap}: intents are left parked")
        if self.stage.check is not None:
            self.stage.check(state)

    def close(self) -> None:
        """Give everything back."""
        for reader in self._readers.values():
            reader.close()
        self.look.execute(
            "update outbox.lane set owner = null, place = null, lease_until = null where owner is not null"
        )
        for conn in self._conns:
            conn.close()

    def wrong(self, step: str, *what: str) -> bool:
        """Whether this is to go wrong now."""
        return self.armed and self.mishap.step == step and self.mishap.what in what

    def took_effect(self, step: str, *, undo: bool) -> None:
        self.effects.setdefault(step, []).append("undo" if undo else "do")


class _Rehearsed:
    """A participant at which one intent goes wrong. Everything else is the participant's own."""

    def __init__(self, rehearsal: Rehearsal, participant: Participant) -> None:
        self._rehearsal = rehearsal
        self._participant = participant
        self.batch_limit = 1  # one effect at a time, so that each can go wrong by itself

    def __getattr__(self, name: str) -> Any:
        return getattr(self._participant, name)

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        rehearsal = self._rehearsal
        found = rehearsal.at(batch[0].id) if batch else None
        if found is None:
            return self._participant.apply(batch, position)
        step, undo = found
        if not undo and rehearsal.wrong(step, "fail before"):
            rehearsal.armed = False
            return [Outcome(Verdict.POISON, error="a rehearsal: it fails")]
        if not undo and rehearsal.wrong(step, "time out"):
            rehearsal.armed = False
            return [Outcome(Verdict.RETRY, error="a rehearsal: not in time", retry_after=1e6, untouched=True)]
        fails = not undo and rehearsal.wrong(step, "fail after")
        outcomes = self._participant.apply(batch, None if fails else position)
        if outcomes and outcomes[0].verdict is Verdict.APPLIED:
            rehearsal.took_effect(step, undo=undo)
        if fails:
            rehearsal.armed = False
            return [Outcome(Verdict.RETRY, error="a rehearsal: it fails after all")]
        if not undo and rehearsal.wrong(step, "crash"):
            rehearsal.armed = False
            raise _Killed
        return outcomes


class _RehearsedEngine(Engine):
    """The engine, at which one function goes wrong, or which dies once."""

    batch_limit = 1

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__(rehearsal.stage.settings, rehearsal.definitions)
        self._rehearsal = rehearsal
        self._pending: list[Callable[[], None]] = []

    def open(self, lane: Any) -> None:
        super().open(lane)
        self._work = _RehearsedWork(self._work, self._rehearsal, self._pending)  # type: ignore[assignment]
        self.set_clock()

    def set_clock(self) -> None:
        assert self._connection is not None  # noqa: S101 - it is open
        with self._connection.begin():
            driver: Any = self._connection.connection.dbapi_connection
            self._rehearsal._set_clock(driver)  # noqa: SLF001 - same module

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002 - kept by the lane
        self._pending.clear()
        with self._transaction() as driver:
            outcomes = Drive(driver, self._definitions, self._work).run(batch)
        for effect in self._pending:
            effect()  # committed now
        rehearsal = self._rehearsal
        row = rehearsal.look.execute(
            "select 1 from outbox.saga_step where step = %s and state <> 'pending' and saga::text = %s",
            (rehearsal.mishap.step, batch[0].key if batch else ""),
        ).fetchone()
        if row and rehearsal.wrong(rehearsal.mishap.step, "engine"):
            rehearsal.armed = False
            raise _Killed
        return outcomes


class _RehearsedWork:
    """The application's functions, one of which goes wrong."""

    def __init__(self, work: Stepwork, rehearsal: Rehearsal, pending: list[Callable[[], None]]) -> None:
        self._work = work
        self._rehearsal = rehearsal
        self._pending = pending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def function(self, record: Any, step: Any, *, undo: bool) -> Came:
        rehearsal, name = self._rehearsal, step.name
        mine = record.definition is rehearsal.mishap.saga
        if mine and not undo and rehearsal.wrong(name, "fail before", "fail after", "time out"):
            return self._fail(record, step, name)
        came = self._work.function(record, step, undo=undo)
        if mine and came.error == "":
            self._pending.append(lambda: rehearsal.took_effect(name, undo=undo))
        if mine and not undo and rehearsal.wrong(name, "crash"):
            rehearsal.armed = False
            raise _Killed
        return came

    def _fail(self, record: Any, step: Any, name: str) -> Came:
        """As if the function had raised, before or after its work: its savepoint is rolled back."""
        rehearsal, do = self._rehearsal, step.do
        what = rehearsal.mishap.what
        rehearsal.armed = False

        def fails(session: Any, run: Any) -> None:
            if what == "fail after":
                do(session, run)
            if what == "fail before":
                raise Permanent("a rehearsal: it fails")
            raise TimeoutError(name)

        step.do = fails
        try:
            return self._work.function(record, step, undo=False)
        finally:
            step.do = do


def rehearse(stage: Stage, mishap: Mishap) -> str:
    """Run one case. → how the saga ended. Raises `Broken`."""
    rehearsal = Rehearsal(stage, mishap)
    try:
        return rehearsal.run()
    finally:
        rehearsal.close()
