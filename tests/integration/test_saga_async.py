"""Steps that are async functions: their session's writes commit with the step's outcome, or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import Saga
from outbox.errors import Permanent
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step, sink_step


class Base(DeclarativeBase):
    """The models of this file."""


class Thing(Base):
    """A row of the rig's table."""

    __tablename__ = "thing"
    name: Mapped[str] = mapped_column(primary_key=True)
    n: Mapped[int]


INSERT = sa.text("insert into thing values (:name, 1)")


def asynchronous() -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("asynchronous", dict)

    @saga.function
    async def a(session: AsyncSession, run: Any) -> dict[str, int]:
        session.add(Thing(name="a", n=1))
        await session.flush()
        async with session.begin_nested():
            await session.execute(INSERT, {"name": "nested"})
        await asyncio.sleep(0)
        found = (await session.scalars(sa.select(Thing).order_by(Thing.name))).all()
        return {"things": len(found)}

    @a.undo
    async def undo_a(session: AsyncSession, run: Any) -> None:
        assert run.results["a"] == {"things": 2}
        await session.execute(sa.delete(Thing))

    return saga


def test_saga_i7_async_step_commits_with_its_outcome(rig: Rig) -> None:
    saga = asynchronous()
    sink_step(saga, "b")
    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "completed"
    assert rig.things() == {"a": 1, "nested": 1}
    row = rig.admin.execute("select result from outbox.saga_step where step = 'a'").fetchone()
    assert row == ({"things": 2},)


def test_saga_i7_async_compensation_undoes_an_async_step(rig: Rig) -> None:
    saga = asynchronous()

    @saga.function(kind="pivot")
    async def fails(session: AsyncSession, _run: Any) -> None:
        await session.execute(INSERT, {"name": "ghost"})
        raise Permanent("no")

    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "compensated"
    assert rig.things() == {}


async def commits(session: AsyncSession) -> None:
    await session.execute(INSERT, {"name": "half"})
    await session.commit()


async def cancels(session: AsyncSession) -> None:
    await session.execute(INSERT, {"name": "half"})
    raise asyncio.CancelledError


async def swallows(session: AsyncSession) -> None:
    try:
        await session.execute(sa.text("select 1 / 0"))
    except sa.exc.DBAPIError:
        return


@pytest.mark.parametrize("unruly", [commits, cancels, swallows])
def test_saga_i1_async_step_fails_alone_and_leaves_nothing_when_it_is_unruly(rig: Rig, unruly: Any) -> None:
    saga: Saga[dict[str, Any]] = Saga("unruly", dict)

    @saga.function(retry=Retry(attempts=1), kind="pivot")
    async def step(session: AsyncSession, _run: Any) -> None:
        await unruly(session)

    innocent: Saga[dict[str, Any]] = Saga("innocent", dict)
    function_step(innocent, "fine")
    started, other = rig.start(saga, {}), rig.start(innocent, {})
    rig.settle()
    assert (rig.state(started), rig.state(other)) == ("compensated", "completed")
    assert rig.things() == {"fine": 1}


def test_saga_i1_nothing_that_an_async_step_has_begun_goes_on_after_it(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("begins", dict)
    tasks: list[asyncio.Task[None]] = []

    @saga.function(kind="pivot")
    async def step(session: AsyncSession, _run: Any) -> None:
        async def later() -> None:
            await asyncio.sleep(3600)
            await session.execute(INSERT, {"name": "late"})

        tasks.append(asyncio.create_task(later()))
        await session.execute(INSERT, {"name": "in time"})

    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "completed"
    assert tasks[0].cancelled()
    assert rig.things() == {"in time": 1}


def test_saga_async_step_s_intents_commit_with_it(rig: Rig) -> None:
    saga: Saga[dict[str, Any]] = Saga("emits", dict)

    @saga.function(kind="pivot")
    async def step(session: AsyncSession, _run: Any) -> None:
        rig.outbox.emit(session.sync_session, "sink", "put", "k", "from a step")
        await session.execute(INSERT, {"name": "a"})

    started = rig.start(saga, {})
    rig.settle()
    assert rig.state(started) == "completed"
    assert rig.done() == ["from a step"]
