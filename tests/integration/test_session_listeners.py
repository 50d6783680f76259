"""What listeners of the application emit while its session flushes and commits, too: with the rows, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, sessionmaker

from outbox import Outbox, Settings
from outbox.errors import IntentRefused


class Base(DeclarativeBase):
    """The models of this file."""


class Memo(Base):
    """A row."""

    __tablename__ = "memo"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@pytest.fixture
def sessions(app_url: str) -> Iterator[sessionmaker[Session]]:
    engine = sa.create_engine("postgresql+psycopg://" + app_url.split("://")[1])
    Base.metadata.create_all(engine)
    yield sessionmaker(engine)
    engine.dispose()


@pytest.fixture
def outbox(sessions: sessionmaker[Session], app_url: str, tmp_path: Path) -> Outbox:
    return Outbox(sessions, Settings(app_url, tmp_path / "index", tmp_path / "blobs", "smtp://127.0.0.1:1"))


@pytest.fixture
def logged(admin: psycopg.Connection[Any]) -> Callable[[], list[str]]:
    """The keys in the log, in its order."""
    return lambda: [row[0] for row in admin.execute("select key from outbox.log order by id")]


def put(outbox: Outbox, session: Session, key: str) -> None:
    outbox.index.put(session, key, text="text")


@pytest.fixture
def follow(sessions: sessionmaker[Session], outbox: Outbox) -> Iterator[Callable[[str], None]]:
    """Attaches a listener that emits for each memo that is written."""
    undo: list[Callable[[], None]] = []

    def mapper(_mapper: Any, _connection: Any, memo: Memo) -> None:
        session = object_session(memo)
        assert session is not None
        put(outbox, session, f"memo/{memo.text}")

    def flush(session: Session, *_: Any) -> None:
        for one in list(session.new):
            put(outbox, session, f"memo/{one.text}")

    def attach(name: str) -> None:
        target, listener = (Memo, mapper) if name == "after_insert" else (sessions, flush)
        event.listen(target, name, listener)
        undo.append(lambda: event.remove(target, name, listener))

    yield attach
    for each in undo:
        each()


FLUSHES = ("before_flush", "after_flush", "after_insert")


@pytest.mark.parametrize("name", FLUSHES)
@pytest.mark.parametrize("nested", [False, True])
def test_session_i2_inserts_what_a_listener_emits_when_the_commit_flushes(
    sessions: sessionmaker[Session], follow: Callable[[str], None], logged: Any, name: str, nested: bool
) -> None:
    # Given an application whose intents follow its rows, by a listener of the flush
    follow(name)
    # When the commit (of the transaction, or of a savepoint) is what flushes, and nothing else was emitted before
    with sessions.begin() as session:
        if nested:
            with session.begin_nested():
                session.add(Memo(text="a"))
        else:
            session.add(Memo(text="a"))
    # Then the intent is committed with the row
    assert logged() == ["memo/a"]


@pytest.mark.parametrize("name", FLUSHES)
def test_session_i2_i4_inserts_what_follows_rows_that_another_listener_of_the_commit_has_added(
    sessions: sessionmaker[Session], outbox: Outbox, follow: Callable[[str], None], logged: Any, name: str
) -> None:
    # Given that, and a listener of the commit that was attached later: it adds a row, and emits something of its own
    follow(name)

    def late(session: Session) -> None:
        session.add(Memo(text="late"))
        put(outbox, session, "of the commit")

    event.listen(sessions, "before_commit", late)
    # When a transaction is committed
    with sessions.begin() as session:
        session.add(Memo(text="a"))
    # Then everything is in the log: a row's intent when the row is there
    assert logged()[0] == "memo/a"
    assert sorted(logged()) == ["memo/a", "memo/late", "of the commit"]


def test_session_i2_inserts_what_a_later_listener_adds_for_the_commit_to_flush(
    sessions: sessionmaker[Session], follow: Callable[[str], None], logged: Any
) -> None:
    follow("after_insert")
    event.listen(sessions, "before_commit", lambda session: session.add(Memo(text="late")))
    with sessions.begin() as session:
        session.add(Memo(text="a"))
    assert logged() == ["memo/a", "memo/late"]


def test_session_i2_flushes_until_listeners_of_the_flush_have_nothing_to_add(
    sessions: sessionmaker[Session], follow: Callable[[str], None], logged: Any
) -> None:
    # Given a listener that adds a row for a row, twice
    follow("before_flush")

    @event.listens_for(sessions, "after_flush_postexec")
    def add(session: Session, _context: Any) -> None:
        if (count := session.scalar(sa.select(sa.func.count()).select_from(Memo))) and count < 3:
            session.add(Memo(text=str(count)))

    with sessions.begin() as session:
        session.add(Memo(text="0"))
    assert logged() == ["memo/0", "memo/1", "memo/2"]


def test_session_i1_forgets_what_a_listener_emitted_when_the_commit_fails(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    def late(session: Session) -> None:
        put(outbox, session, "ghost")
        raise ZeroDivisionError

    event.listen(sessions, "before_commit", late)
    with sessions() as session:
        session.add(Memo(text="a"))
        with pytest.raises(ZeroDivisionError):
            session.commit()
        session.rollback()
        event.remove(sessions, "before_commit", late)
        # Then the next transaction begins with nothing, and its list is its own
        put(outbox, session, "a")
        with session.begin_nested() as inner:
            put(outbox, session, "ghost")
            inner.rollback()
        session.commit()
    assert logged() == ["a"]


def test_session_i2_refuses_what_comes_when_the_transaction_is_committed_or_prepared(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    # Given an outbox that knows its targets, so that an emit needs no statement
    with sessions.begin() as session:
        put(outbox, session, "a")
    refused: list[str] = []

    @event.listens_for(sessions, "after_commit")
    def emit(session: Session) -> None:
        with pytest.raises(IntentRefused) as caught:
            put(outbox, session, "lost")
        refused.append(str(caught.value))

    # When a listener emits after the commit, of the transaction and of a savepoint
    with sessions.begin() as session, session.begin_nested():
        session.add(Memo(text="a"))
    # Then it is told so, where it would be in no transaction at all
    assert len(refused) == 2
    event.remove(sessions, "after_commit", emit)
    # And the same of a transaction that is prepared, and can only end
    sessions.configure(twophase=True)
    with sessions() as session:
        put(outbox, session, "b")
        session.prepare()
        with pytest.raises(IntentRefused, match="prepared"):
            put(outbox, session, "lost")
        session.commit()
    assert logged() == ["a", "b"]


def test_session_i2_commits_no_row_without_its_intent_when_a_commit_is_tried_again(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any], logged: Any
) -> None:
    # Given a log that can't be written for a moment
    with sessions() as session, admin.transaction():
        session.add(Memo(text="a"))
        session.flush()
        put(outbox, session, "a")
        session.execute(sa.text("set local lock_timeout = '50ms'"))
        admin.execute("lock table outbox.log in exclusive mode")
        # When the commit fails of it, and the application tries that again
        for _ in range(2):
            with pytest.raises(sa.exc.DBAPIError):
                session.commit()
        session.rollback()
    # Then it is told twice: nothing was committed, the row as little as the intent
    assert logged() == []
    assert admin.execute("select count(*) from memo").fetchone() == (0,)
