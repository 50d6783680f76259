"""Async applications and async actors: sends commit with an AsyncSession, and an actor acknowledges in its own."""

from __future__ import annotations

import asyncio
from typing import Any

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.middleware import AsyncIO
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from outbox import Outbox
from outbox.actor import OutboxBroker
from outbox.errors import NotReady
from tests.fixtures.actors import Stage
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import until

PAY = sa.text("insert into payment values (:name)")


class Shop:
    """An application with nothing but AsyncSessions."""

    def __init__(self, stage: Stage, url: str | None = None) -> None:
        self.engine: AsyncEngine = create_async_engine(url or stage.app.sqlalchemy_url, poolclass=NullPool)
        self.sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(self.engine)
        self.outbox = Outbox(self.sessions, stage.app)
        self.broker = OutboxBroker(self.outbox, settings=stage.app, worker=stage.settings("actor"))
        self.broker.add_middleware(AsyncIO())
        self.note = self.actor(stage.company._note, "note")

    def actor(self, run: Any, name: str, **options: Any) -> dramatiq.Actor[..., Any]:
        return dramatiq.actor(broker=self.broker, actor_name=name, min_backoff=50, max_backoff=50, **options)(run)


@pytest.fixture
def shop(stage: Stage) -> Shop:
    made = Shop(stage)
    stage.brokers.append(made.broker)
    return made


def test_actor_i1_i2_send_commits_with_an_async_session(stage: Stage, shop: Shop) -> None:
    async def application() -> None:
        # Given transactions of AsyncSessions that commit, roll back, or roll back to a savepoint
        async with shop.sessions.begin() as session:
            shop.note.send("committed")
            shop.note.send("committed too")
            async with session.begin_nested() as savepoint:
                shop.note.send("savepoint")
                await savepoint.rollback()
            assert await session.scalar(sa.text("select count(*) from outbox.log")) == 0
        with pytest.raises(ZeroDivisionError):
            async with shop.sessions.begin():
                shop.note.send("never")
                raise ZeroDivisionError
        # And two of them at the same time, in two tasks
        await asyncio.gather(_in_a_task(shop, "one"), _in_a_task(shop, "two"))

    asyncio.run(application())
    # Then only what committed is in the log
    sent = stage.admin.execute("select payload #>> '{args,0}' from outbox.log order by id").fetchall()
    assert sorted(row[0] for row in sent) == ["committed", "committed too", "one", "two"]


async def _in_a_task(shop: Shop, name: str) -> None:
    async with shop.sessions() as session:
        await session.execute(sa.text("select pg_sleep(0)"))
        shop.note.send(name)
        await session.commit()


def test_actor_i3_async_actor_pays_once_and_sends_with_its_payment(stage: Stage, shop: Shop) -> None:
    # Given an async actor whose transaction fails the first time
    tries: list[str] = []

    async def pay(name: str) -> None:
        tries.append(name)
        async with shop.broker.atransaction() as session:
            await session.execute(PAY, {"name": name})
            shop.note.send(f"paid {name}")
            if len(tries) == 1:
                raise RuntimeError("before the commit")

    # When it runs twice, and the message is from its lane first, and then parked
    shop.actor(pay, "pay").send("x")
    stage.work_for(shop.broker)
    stage.drained()
    # Then it has paid once, and sent once
    assert (tries, stage.payments(), stage.runs("paid x"), stage.parked()) == (["x", "x"], ["x"], 1, [])


def test_actor_i3_async_payment_is_made_once_when_the_answer_to_its_commit_never_came(
    stage: Stage, proxy: Proxy
) -> None:
    # Given an async actor whose connection is cut after its COMMIT
    shop = Shop(stage, proxy.url("app", stage.database).replace("postgresql:", "postgresql+psycopg:"))
    stage.brokers.append(shop.broker)
    tries: list[str] = []

    async def pay(name: str) -> None:
        tries.append(name)
        async with shop.broker.atransaction() as session:
            await session.execute(PAY, {"name": name})

    proxy.cut_commit("after")
    # When it pays
    shop.actor(pay, "pay").send("x")
    stage.work_for(shop.broker)
    until(lambda: proxy.has_cut, "the answer was cut off")
    stage.drained()
    # Then it has paid, and nobody pays again
    assert (tries, stage.payments(), stage.parked()) == (["x"], ["x"], [])


def test_actor_i3_async_transaction_is_rolled_back_when_the_message_is_in_other_hands(stage: Stage, shop: Shop) -> None:
    # Given an async actor in the middle of its transaction
    outcome: list[str] = []

    async def pay(name: str) -> None:
        try:
            async with shop.broker.atransaction() as session:
                stage.company.ran(name)
                await session.execute(PAY, {"name": name})
                await asyncio.to_thread(until, lambda: stage.one("select count(*) from gate"), "the gate is open")
        except Exception as error:
            outcome.append(type(error).__name__)
            raise

    shop.actor(pay, "pay").send("x")
    stage.work_for(shop.broker)
    until(lambda: stage.runs("x") == 1, "it runs")
    # When its lanes are taken away from it
    stage.admin.execute(
        "update outbox.lane set epoch = epoch + 1, owner = null, lease_until = null where target like 'actor%'"
    )
    stage.open_gate("gate")
    # Then nothing of that try is written
    until(lambda: outcome == ["Fenced"], "it is refused")
    stage.drained()
    assert (stage.runs("x"), stage.payments()) == (2, ["x"])


def test_actor_i10_lease_goes_on_when_an_actor_blocks_the_event_loop(stage: Stage, shop: Shop) -> None:
    # Given an async actor that blocks the event loop, so that nothing else runs in it
    async def blocks(name: str) -> None:
        stage.company._waits(name, "gate")

    shop.broker._worker = stage.settings("actor", ttl=2.0)
    shop.actor(blocks, "blocks").send("x")
    stage.work_for(shop.broker)
    until(lambda: stage.runs("x") == 1, "it runs")
    # When that takes longer than a lease
    until_when = "select extract(epoch from min(lease_until)) from outbox.lane where target ~ 'actor'"
    first = stage.one(until_when)
    until(lambda: stage.one(until_when) > first + 4, "the lease was renewed for twice its length")
    # Then the lanes are still its own, and others' messages are served
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("x"), stage.parked()) == (1, [])


def test_actor_atransaction_says_what_is_missing_when_there_are_no_async_sessions(stage: Stage, shop: Shop) -> None:
    # Given an async actor of a broker whose outbox has plain sessions
    company = stage.company
    company.broker.add_middleware(AsyncIO())
    said: list[str] = []

    async def pay(name: str, which: str) -> None:
        sessions: Any = {"none": None, "strange": async_sessionmaker(shop.engine), "ours": ours}[which]
        try:
            async with company.broker.atransaction(sessions) as session:
                await session.execute(PAY, {"name": name})
        except NotReady as error:
            said.append(str(error))

    # When it is told none, or some that have nothing to do with the outbox, or some that have
    ours = async_sessionmaker(shop.engine, sync_session_class=company.sessions)
    actor = dramatiq.actor(broker=company.broker, actor_name="apay")(pay)
    for which in ("none", "strange", "ours"):
        actor.send(which, which)
    stage.work()
    stage.drained()
    # Then it says so, or pays
    assert sorted(one.partition(":")[0] for one in said) == [
        "no outbox is attached to this session", "the broker has no async sessions",
    ]  # fmt: skip
    assert stage.payments() == ["ours"]
    with pytest.raises(NotReady, match="in an actor"):
        asyncio.run(_nowhere(shop.broker))


async def _nowhere(broker: OutboxBroker) -> None:
    async with broker.atransaction():
        pass


def test_actor_transaction_says_what_to_use_when_the_sessions_are_async(stage: Stage, shop: Shop) -> None:
    said: list[str] = []

    def pay(name: str) -> None:
        with pytest.raises(NotReady) as error, shop.broker.transaction():
            pass
        said.append(f"{name}: {error.value}")

    shop.actor(pay, "pay").send("x")
    stage.work_for(shop.broker)
    stage.drained()
    assert said[0].startswith("x: the broker has no sessionmaker")


def test_outbox_attaches_to_an_async_sessionmaker_that_has_sessions_of_its_own(stage: Stage, shop: Shop) -> None:
    # Given an async_sessionmaker whose sessions are of another sessionmaker, to which an outbox is attached
    plain = sessionmaker()
    sessions = async_sessionmaker(shop.engine, sync_session_class=plain)
    outbox = Outbox(sessions, stage.app)

    async def application() -> None:
        async with sessions.begin() as session:
            assert Outbox.of(session.sync_session) is outbox
            await session.run_sync(lambda plain: outbox.emit(plain, "index", "delete", "k"))
        # When another one has nothing to do with it
        async with async_sessionmaker(shop.engine)() as session:
            with pytest.raises(NotReady):
                Outbox.of(session.sync_session)

    asyncio.run(application())
    assert stage.one("select count(*) from outbox.log") == 1
