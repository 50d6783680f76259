"""Writing intents in an asyncio program: `Outbox` for SQLAlchemy's `AsyncSession`.

    from outbox.aio import AsyncOutbox

    outbox = AsyncOutbox(Session)                  # an async_sessionmaker, or one AsyncSession
    async with Session.begin() as session:
        session.add(note)
        await outbox.index.put(session, f"note/{note.id}", title=note.title, text=note.text)
        blob = await outbox.blobs.put(session, "photo.jpg")
    await outbox.wait(session, outbox.token(session), "index")

The same verbs, with the same promises and errors, since it is the same `Outbox` (`outbox.sync`) on the session behind
the facade. The event loop is never kept waiting: bytes are read, hashed and staged in a thread. If a task is cancelled
in the middle of that, the thread goes on to the end of its file, and the sweeper removes what it has staged, because
its transaction came to nothing.

What takes a plain session is given it by `AsyncSession.run_sync`: `await session.run_sync(saga.start, order)`.

Needs the extra `asyncio`, and an engine of psycopg (`postgresql+psycopg://`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime
from email.message import EmailMessage
from functools import partial
from typing import Any, Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from outbox.blob import Blob, Inline, Staged
from outbox.position import Token
from outbox.session import WAIT_EVERY, WAIT_MOST, Outbox, late, reached
from outbox.settings import Settings
from outbox.source import Bytes, Source
from outbox.store import Store
from outbox.verbs import publish


class AsyncOutbox:
    """The verbs, attached to async sessions. One for each sessionmaker, for the life of the program."""

    def __init__(self, sessions: async_sessionmaker[Any] | AsyncSession, settings: Settings | None = None) -> None:
        """Attach to an async_sessionmaker (all sessions that it makes from now on) or to a single session.

        `settings` says where blobs are staged and what mail's domain is; by default `Settings.load()`, when needed.
        """
        self.sessions = sessions
        #: The `Outbox` behind it, for code that `AsyncSession.run_sync` runs.
        self.sync = Outbox(_behind(sessions), settings)
        self.index = AsyncIndexVerbs(self)
        self.blobs = AsyncBlobVerbs(self)
        self.mail = AsyncMailVerbs(self)

    @property
    def settings(self) -> Settings:
        """Where the participants are."""
        return self.sync.settings

    async def emit(
        self,
        session: AsyncSession,
        target: str,
        action: str,
        key: str,
        payload: Any = None,
        *,
        due: datetime | None = None,
        saga: UUID | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """As `Outbox.emit`."""
        await session.run_sync(self.sync.emit, target, action, key, payload, due=due, saga=saga, headers=headers)

    def about(self, session: AsyncSession, model: object) -> AbstractContextManager[None]:
        """As `Outbox.about`: a plain `with`, in which verbs are awaited."""
        return self.sync.about(session.sync_session, model)

    async def signal(
        self, session: AsyncSession, saga: UUID, name: str, payload: Any = None, *, accepted: bool = True, who: str = ""
    ) -> None:
        """As `Outbox.signal`."""
        await session.run_sync(self.sync.signal, saga, name, payload, accepted=accepted, who=who)

    async def cancel(self, session: AsyncSession, saga: UUID, reason: str, *, who: str = "") -> None:
        """As `Outbox.cancel`."""
        await session.run_sync(self.sync.cancel, saga, reason, who=who)

    def token(self, session: AsyncSession) -> Token | None:
        """As `Outbox.token`."""
        return self.sync.token(session.sync_session)

    async def committed(self, session: AsyncSession, token: Token) -> bool | None:
        """As `Outbox.committed`."""
        return await session.run_sync(self.sync.committed, token)

    async def wait(
        self,
        session: AsyncSession,
        token: Token | None,
        target: str,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109 - as `Outbox.wait`, and its error says where to look
    ) -> None:
        """As `Outbox.wait`; other tasks go on. Raises `WaitTimeout` after `timeout` seconds."""
        if token is None:
            return
        deadline = time.monotonic() + timeout
        pause = WAIT_EVERY
        engine = AsyncEngine(session.sync_session.get_bind().engine)
        while True:
            async with engine.connect() as connection:
                if await connection.run_sync(reached, token, target):
                    return
            if time.monotonic() > deadline:
                raise late(target, timeout)
            await asyncio.sleep(pause)
            pause = min(WAIT_MOST, pause * 1.5)


def _behind(sessions: async_sessionmaker[Any] | AsyncSession) -> sessionmaker[Any] | Session:
    """What makes the plain sessions, or is one, so that events can be listened to."""
    if isinstance(sessions, AsyncSession):
        return sessions.sync_session
    made = sessions.kw.get("sync_session_class") or sessions.class_.sync_session_class
    if not isinstance(made, sessionmaker):
        # A class of its own: the events are those of this sessionmaker's sessions only.
        made = sessionmaker(class_=made)
        sessions.configure(sync_session_class=made)
    return made


class AsyncIndexVerbs:
    """`outbox.index`: what is found by searching."""

    def __init__(self, outbox: AsyncOutbox) -> None:
        self._outbox = outbox

    async def put(
        self,
        session: AsyncSession,
        key: str,
        *,
        title: str = "",
        text: str = "",
        keywords: Mapping[str, str | Sequence[str]] | None = None,
        data: dict[str, Any] | None = None,
        language: str = "en",
    ) -> None:
        """As `IndexVerbs.put`."""
        verb = self._outbox.sync.index.put
        await session.run_sync(verb, key, title=title, text=text, keywords=keywords, data=data, language=language)

    async def delete(self, session: AsyncSession, key: str) -> None:
        """As `IndexVerbs.delete`."""
        await session.run_sync(self._outbox.sync.index.delete, key)


class AsyncBlobVerbs:
    """`outbox.blobs`: files of any size, named by what is in them."""

    def __init__(self, outbox: AsyncOutbox) -> None:
        self._outbox = outbox

    @property
    def store(self) -> Store:
        """Where the blobs are, for reading. Its calls block: `await asyncio.to_thread(…)`."""
        return self._outbox.sync.blobs.store

    async def put(
        self,
        session: AsyncSession,
        source: Bytes,
        *,
        size: int | None = None,
        name: str = "",
        type: str = "",  # noqa: A002 - the word that users know from HTTP
    ) -> Blob:
        """As `BlobVerbs.put`. A file object is read in another thread: leave it alone until this returns."""
        made = await self._made(session, source, size)
        return await session.run_sync(partial(publish, self._outbox.sync), made, name=name, type=type)

    async def stage(
        self, session: AsyncSession, source: Bytes, *, size: int | None = None, name: str = ""
    ) -> dict[str, Any]:
        """As `BlobVerbs.stage`."""
        made = await self._made(session, source, size)
        return dict(made.payload(name=name))

    async def delete(self, session: AsyncSession, digest: str) -> None:
        """As `BlobVerbs.delete`."""
        await session.run_sync(self._outbox.sync.blobs.delete, digest)

    async def _made(self, session: AsyncSession, source: Bytes, size: int | None) -> Staged | Inline:
        staging = self._outbox.sync.blobs.staging

        def look() -> tuple[Source, Inline | None]:
            content = Source(source, size=size).__enter__()
            try:
                return content, staging.inline(content)
            except BaseException:
                content.close()
                raise

        content, small = await asyncio.to_thread(look)
        if small is not None:
            content.close()
            return small
        try:
            owner = await session.run_sync(staging.owner)
        except BaseException:
            content.close()
            raise

        def stage() -> Staged:
            # Closed by the thread that reads: a cancelled task doesn't take the file away from it.
            with closing(content):
                return staging.store.stage(content, **owner)

        return await asyncio.to_thread(stage)


class AsyncMailVerbs:
    """`outbox.mail`: mail that is sent if, and only if, the transaction commits."""

    def __init__(self, outbox: AsyncOutbox) -> None:
        self._outbox = outbox

    async def send(
        self,
        session: AsyncSession,
        message: EmailMessage | None = None,
        *,
        key: str | None = None,
        in_doubt: Literal["resend", "hold", "drop"] = "resend",
        **parts: Any,
    ) -> str:
        """As `MailVerbs.send`."""
        verb = self._outbox.sync.mail.send
        return await session.run_sync(lambda behind: verb(behind, message, key=key, in_doubt=in_doubt, **parts))
