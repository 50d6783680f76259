"""`AsyncOutbox`: what is emitted in an `AsyncSession` commits with the rows, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import Outbox, Saga, Settings
from outbox.aio import AsyncOutbox
from outbox.errors import NotReady, PayloadInvalid, PayloadTooLarge, UnknownTarget, WaitTimeout
from tests.fixtures.lanes import Bench
from tests.fixtures.site import LIMIT
from tests.integration.test_session import SHAPES
from workers.sweeper import Swept, sweep


class Base(DeclarativeBase):
    """The models of this file."""


class Note(Base):
    """A row."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Program:
    """An asyncio program with an engine, sessions and an outbox."""

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self.engine = engine
        self.sessions = async_sessionmaker(engine)
        self.outbox = AsyncOutbox(self.sessions, settings)

    async def put(self, session: AsyncSession, key: str) -> None:
        await self.outbox.index.put(session, key, text="text")


Run = Callable[[Callable[[Program], Awaitable[None]]], None]


@pytest.fixture
def run(app_url: str, tmp_path: Path, admin: psycopg.Connection[Any]) -> Run:
    """Runs an async function with a program that is closed after it."""
    url = "postgresql+psycopg://" + app_url.split("://")[1]
    made = sa.create_engine(url)
    Base.metadata.create_all(made)
    made.dispose()
    settings = Settings(app_url, tmp_path / "index", tmp_path / "blobs", "smtp://127.0.0.1:1")

    @asynccontextmanager
    async def program() -> AsyncIterator[Program]:
        engine = create_async_engine(url)
        try:
            yield Program(engine, settings)
        finally:
            await engine.dispose()

    async def whole(what: Callable[[Program], Awaitable[None]]) -> None:
        async with asyncio.timeout(LIMIT), program() as made:
            await what(made)

    return lambda what: asyncio.run(whole(what))


@pytest.fixture
def logged(admin: psycopg.Connection[Any]) -> Any:
    """The keys in the log, in its order."""
    return lambda: [row[0] for row in admin.execute("select key from outbox.log order by id")]


def test_async_session_i1_i2_writes_the_intents_with_the_rows_or_neither(
    run: Run, logged: Any, admin: psycopg.Connection[Any]
) -> None:
    async def program(p: Program) -> None:
        async with p.sessions.begin() as session:
            session.add(Note(text="hello"))
            await p.put(session, "a")
            await p.put(session, "b")
        with pytest.raises(ZeroDivisionError):
            async with p.sessions.begin() as session:
                session.add(Note(text="ghost"))
                await p.put(session, "ghost")
                raise ZeroDivisionError
        async with p.sessions() as session:
            await p.put(session, "ghost")
            await session.rollback()
            session.add(Note(text="other"))
            await session.commit()

    run(program)
    assert logged() == ["a", "b"]
    assert admin.execute("select text from note order by id").fetchall() == [("hello",), ("other",)]


def test_async_session_i2_inserts_what_listeners_emit_when_the_commit_flushes(run: Run, logged: Any) -> None:
    async def program(p: Program) -> None:
        # Given listeners of the sessions behind the facade: of the flush, and of the commit, attached after the outbox
        behind = p.sessions.kw["sync_session_class"]

        def flush(session: Session, _context: Any) -> None:
            p.outbox.sync.index.put(session, "of the flush", text="text")

        def commit(session: Session) -> None:
            p.outbox.sync.index.put(session, "of the commit", text="text")

        sa.event.listen(behind, "after_flush", flush)
        sa.event.listen(behind, "before_commit", commit)
        # When it is the commit that flushes
        async with p.sessions.begin() as session:
            session.add(Note(text="hello"))

    run(program)
    # Then both are committed with the row
    assert logged() == ["of the flush", "of the commit"]


@pytest.mark.parametrize(("shape", "expected"), SHAPES.items())
def test_async_session_i1_i2_i4_follows_savepoints(run: Run, logged: Any, shape: str, expected: str) -> None:
    async def program(p: Program) -> None:
        async with p.sessions() as session:
            nested = []
            for step in shape:
                match step:
                    case "(":
                        nested.append(await session.begin_nested())
                    case ")":
                        await nested.pop().commit()
                    case "!":
                        await nested.pop().rollback()
                    case _:
                        await p.put(session, step)
            await session.commit()

    run(program)
    assert "".join(logged()) == expected


def test_async_session_i4_draws_ids_after_the_rows_are_locked(run: Run, admin: psycopg.Connection[Any]) -> None:
    async def program(p: Program) -> None:
        async with p.sessions.begin() as session:
            await p.put(session, "k")
            session.add(Note(text="row"))

    run(program)
    query = "select (select cmin::text::int from note) < (select cmin::text::int from outbox.log)"
    assert admin.execute(query).fetchone() == (True,)


def test_async_session_has_every_verb(run: Run, admin: psycopg.Connection[Any]) -> None:
    saga: Saga[dict[str, Any]] = Saga("asynchronous", dict)
    saga.signal("approval", timeout=60)
    sents = []

    async def program(p: Program) -> None:
        async with p.sessions.begin() as session:
            blob = await p.outbox.blobs.put(session, b"abc" * 50_000, name="a.txt")
            small = await p.outbox.blobs.put(session, io.BytesIO(b"abc"))
            await p.outbox.blobs.delete(session, small.digest)
            await p.outbox.index.put(session, "k", title="t")
            await p.outbox.index.delete(session, "k")
            sent = await p.outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject="s", text="t")
            number = await session.run_sync(saga.start, {})
            await p.outbox.signal(session, number, "approval", {"by": "me"})
            await p.outbox.cancel(session, number, "changed my mind")
            assert blob.size == 150_000
            sents.append(sent)

    run(program)
    rows = admin.execute("select target || ' ' || action from outbox.log order by id").fetchall()
    assert [row[0] for row in rows] == [
        "blob put", "blob put", "blob delete", "index put", "index delete", "mail send",
        "saga start", "saga signal", "saga cancel",
    ]  # fmt: skip
    row = admin.execute("select payload ->> 'message_id' from outbox.log where target = 'mail'").fetchone()
    assert row == (sents[0],)


def test_async_session_refuses_before_the_commit_and_goes_on(run: Run, logged: Any) -> None:
    async def program(p: Program) -> None:
        async with p.sessions.begin() as session:
            with pytest.raises(PayloadInvalid):
                await p.outbox.emit(session, "index", "put", "bad", {"x": float("nan")})
            with pytest.raises(UnknownTarget, match="blob, index, mail"):
                await p.outbox.emit(session, "indx", "put", "bad")
            await p.put(session, "good")

    run(program)
    assert logged() == ["good"]


def test_async_session_tells_postgres_refusal_in_our_words_without_the_payload(
    run: Run, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.intent._spelled_out", lambda _payload: 0)

    async def program(p: Program) -> None:
        async with p.sessions() as session:
            await p.outbox.emit(session, "index", "put", "k", [1e300] * 1000)
            with pytest.raises(PayloadTooLarge, match="64 KiB"):
                await session.commit()
            await session.rollback()
            await p.put(session, "good")
            await session.commit()

    run(program)
    assert logged() == ["good"]


def test_async_session_loses_its_connection_as_sqlalchemy_says_it(
    run: Run, logged: Any, admin: psycopg.Connection[Any]
) -> None:
    async def program(p: Program) -> None:
        async with p.sessions() as session:
            await p.put(session, "lost")
            pid = (await session.execute(sa.text("select pg_backend_pid()"))).scalar_one()
            admin.execute("select pg_terminate_backend(%s, 90000)", (pid,))
            with pytest.raises(sa.exc.DBAPIError) as caught:
                await session.commit()
            assert caught.value.connection_invalidated
            await session.rollback()
            await p.put(session, "again")
            await session.commit()

    run(program)
    assert logged() == ["again"]


class Gated(io.BytesIO):
    """A file whose bytes come when the event loop has gone on."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reading = threading.Event()
        self.gate = threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        self.reading.set()
        assert self.gate.wait(LIMIT), "the event loop stood still while a file was read"
        return super().read(size)


def test_async_session_stages_a_file_while_the_event_loop_goes_on(run: Run, logged: Any) -> None:
    source = Gated(b"x" * 300_000)

    async def opens() -> None:
        await asyncio.to_thread(source.reading.wait, LIMIT)
        source.gate.set()

    async def program(p: Program) -> None:
        async with p.sessions.begin() as session:
            blob, _ = await asyncio.gather(p.outbox.blobs.put(session, source), opens())
        assert [stage.name for stage in p.outbox.blobs.store.stages()]
        assert logged() == [blob.digest]

    run(program)


def test_async_session_i1_leaves_a_cancelled_upload_to_the_sweeper(
    run: Run, logged: Any, admin: psycopg.Connection[Any]
) -> None:
    source = Gated(b"x" * 300_000)
    stores = []

    async def program(p: Program) -> None:
        async def upload() -> None:
            async with p.sessions.begin() as session:
                await p.outbox.blobs.put(session, source, size=300_000)

        # Given: a request that is cancelled while its file is read
        task = asyncio.create_task(upload())
        await asyncio.to_thread(source.reading.wait, LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # When: the thread comes to its end
        source.gate.set()
        stores.append(p.outbox.blobs.store)

    run(program)
    # Then: nothing is written, and what was staged goes
    assert logged() == []
    [stage] = stores[0].stages()
    assert sweep(admin, stores[0], log=stage.log, trash_age=0) == Swept(aborted=1)
    assert not list(stores[0].stages())


def test_async_session_waits_for_a_participant_while_other_tasks_go_on(run: Run, bench: Bench) -> None:
    async def program(p: Program) -> None:
        async with p.sessions() as session:
            await p.outbox.emit(session, "sink", "put", "k", {})
            await session.commit()
            token = p.outbox.token(session)
            assert token is not None
            assert await p.outbox.committed(session, token) is True
            with pytest.raises(WaitTimeout, match="outbox status"):
                await p.outbox.wait(session, token, "sink", timeout=0.05)
            with pytest.raises(UnknownTarget):
                await p.outbox.wait(session, token, "nobody", timeout=LIMIT)

            async def drains() -> None:
                bench.drain(bench.reader())

            await asyncio.gather(p.outbox.wait(session, token, "sink", timeout=LIMIT), drains())
            await p.outbox.wait(session, None, "sink")

    run(program)


def test_async_session_is_attached_to_one_session_or_to_the_sessions_of_a_plain_maker(
    run: Run, logged: Any, app_url: str
) -> None:
    async def program(p: Program) -> None:
        async with AsyncSession(p.engine) as single:
            outbox = AsyncOutbox(single, p.outbox.settings)
            await outbox.index.put(single, "a")
            await single.commit()
        # As SQLAlchemy's documentation has it for events of async sessions.
        plain = sessionmaker()
        made = async_sessionmaker(p.engine, sync_session_class=plain)
        outbox = AsyncOutbox(made, p.outbox.settings)
        async with made.begin() as session:
            await outbox.index.put(session, "b")
        # Others are left alone.
        async with async_sessionmaker(p.engine)() as other:
            with pytest.raises(NotReady, match="no outbox is attached"):
                await other.run_sync(Outbox.of)

    run(program)
    assert logged() == ["a", "b"]


def test_session_refuses_an_engine_of_another_driver_before_the_commit(app_url: str) -> None:
    sessions = sessionmaker(sa.create_engine("sqlite://"), class_=Session)
    outbox = Outbox(sessions, Settings(app_url, None, None, "smtp://127.0.0.1:1"))
    with sessions() as session, pytest.raises(NotReady, match=r"psycopg 3.*postgresql\+psycopg"):
        outbox.index.put(session, "k")
