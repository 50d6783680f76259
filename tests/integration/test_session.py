"""The session hooks: what is emitted commits with the rows, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import Outbox, Settings
from outbox.errors import (
    AddressInvalid,
    BlobRefused,
    IntentRefused,
    PayloadInvalid,
    PayloadTooLarge,
    UnknownTarget,
    WaitTimeout,
)
from outbox.intent import _spelled_out, payload_text
from tests.fixtures.lanes import Bench


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@pytest.fixture
def engine(app_url: str) -> Iterator[sa.Engine]:
    made = sa.create_engine("postgresql+psycopg://" + app_url.split("://")[1])
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def sessions(engine: sa.Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)


@pytest.fixture
def outbox(sessions: sessionmaker[Session], app_url: str, tmp_path: Path) -> Outbox:
    return Outbox(sessions, Settings(app_url, tmp_path / "index", tmp_path / "blobs", "smtp://127.0.0.1:1"))


@pytest.fixture
def logged(admin: psycopg.Connection[Any]) -> Any:
    """The keys in the log, in its order."""
    return lambda: [row[0] for row in admin.execute("select key from outbox.log order by id")]


def put(outbox: Outbox, session: Session, key: str) -> None:
    outbox.index.put(session, key, text="text")


def test_session_i2_writes_the_intents_with_the_rows_when_committed(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    with sessions.begin() as session:
        note = Note(text="hello")
        session.add(note)
        put(outbox, session, "a")
        put(outbox, session, "b")
    assert logged() == ["a", "b"]


def test_session_i1_writes_nothing_when_rolled_back(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    with sessions() as session:
        put(outbox, session, "ghost")
        session.rollback()
        session.add(Note(text="other"))
        session.commit()
        put(outbox, session, "closed")
    assert logged() == []


def test_session_i1_forgets_what_a_failed_block_emitted(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    with pytest.raises(ZeroDivisionError), sessions.begin() as session:
        put(outbox, session, "ghost")
        raise ZeroDivisionError
    assert logged() == []


#: Each letter is an emit; ( begins a savepoint, ) releases it, ! rolls it back.
SHAPES = {
    "a(b)c": "abc",
    "a(b!c": "ac",
    "(a(b!c)d": "acd",
    "(a(b)c!d": "d",
    "a(b(c)d)e": "abcde",
    "a((b!c)(d!e": "ace",
    "(a!": "",
    "a(": "a",
}


@pytest.mark.parametrize(("shape", "expected"), SHAPES.items())
@pytest.mark.parametrize("flushed", [False, True])
def test_session_i1_i2_i4_follows_savepoints(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any, shape: str, expected: str, flushed: bool
) -> None:
    with sessions() as session:
        nested = []
        for step in shape:
            match step:
                case "(":
                    nested.append(session.begin_nested())
                case ")":
                    nested.pop().commit()
                case "!":
                    nested.pop().rollback()
                case _:
                    put(outbox, session, step)
                    if flushed:
                        session.add(Note(text=step))
                        session.flush()
        session.commit()
    assert "".join(logged()) == expected


def test_session_i2_survives_a_savepoint_that_an_integrity_error_rolled_back(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    with sessions.begin() as session:
        session.add(Note(id=1, text="first"))
        put(outbox, session, "kept")
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            put(outbox, session, "ghost")
            session.execute(sa.insert(Note).values(id=1, text="again"))
        put(outbox, session, "after")
    assert logged() == ["kept", "after"]


def test_session_i4_draws_ids_after_the_rows_are_locked(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any]
) -> None:
    with sessions.begin() as session:
        put(outbox, session, "k")  # emitted before the row is even added
        session.add(Note(text="row"))
    # The number of the command within its transaction that wrote each.
    query = "select (select cmin::text::int from note) < (select cmin::text::int from outbox.log)"
    assert admin.execute(query).fetchone() == (True,)


def test_session_writes_many_intents_in_one_statement(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any, admin: psycopg.Connection[Any]
) -> None:
    with sessions.begin() as session:
        for n in range(500):
            put(outbox, session, f"k{n:03}")
    assert logged() == [f"k{n:03}" for n in range(500)]
    assert admin.execute("select count(distinct xid) from outbox.log").fetchone() == (1,)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ({"x": "y" * 70_000}, PayloadTooLarge),
        ({"x": {1, 2}}, PayloadInvalid),
        ({"x": float("nan")}, PayloadInvalid),
        ({"x": "a\x00b"}, PayloadInvalid),
        ({"x": "\ud800"}, PayloadInvalid),
        ({"x": 10**5000}, PayloadInvalid),
        ({1: "x"}, PayloadInvalid),
        # 301 digits each, as Postgres prints them.
        ([1e300] * 218, PayloadTooLarge),
        ([{"x": -1e-300}] * 250, PayloadTooLarge),
    ],
)
def test_session_refuses_a_payload_before_the_commit_and_goes_on(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any, payload: Any, error: type[Exception]
) -> None:
    with sessions.begin() as session:
        session.add(Note(text="row"))
        with pytest.raises(error):
            outbox.emit(session, "index", "put", "bad", payload)
        put(outbox, session, "good")
    assert logged() == ["good"]


def test_session_refuses_what_is_nested_too_deeply(sessions: sessionmaker[Session], outbox: Outbox) -> None:
    deep: Any = []
    for _ in range(1200):
        deep = [deep]
    with sessions() as session, pytest.raises(PayloadInvalid, match="levels deep"):
        outbox.emit(session, "index", "put", "k", deep)


@pytest.mark.parametrize(
    "payload",
    [[1e300] * 200, [1.5e-300, -2.25e17, 1e16, 1e15, 1e-4, 1e-5, 5e-324, -0.5], "1e300", {"1e+9": 0}],
)
def test_session_measures_a_payload_as_postgres_prints_it(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any], payload: Any
) -> None:
    with sessions.begin() as session:
        outbox.emit(session, "index", "put", "k", payload)
    row = admin.execute("select octet_length(payload::text) from outbox.log").fetchone()
    assert row == (len(payload_text(payload)) + _spelled_out(payload),)


def test_session_says_so_when_postgres_finds_a_payload_too_large(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: it was measured wrongly
    monkeypatch.setattr("outbox.intent._spelled_out", lambda _payload: 0)
    with sessions() as session:
        outbox.emit(session, "index", "put", "k", [1e300] * 1000)
        with pytest.raises(PayloadTooLarge, match="64 KiB"):
            session.commit()
        session.rollback()
    assert logged() == []


def test_session_refuses_an_unknown_target_and_names_the_known_ones(
    sessions: sessionmaker[Session], outbox: Outbox, logged: Any
) -> None:
    with sessions.begin() as session:
        with pytest.raises(UnknownTarget, match="blob, index, mail"):
            outbox.emit(session, "indx", "put", "k")
        with pytest.raises(UnknownTarget):
            outbox.emit(session, "clock", "put", "k")
    assert logged() == []


@pytest.mark.parametrize(
    ("target", "action", "key"), [("Index", "put", "k"), ("index", "p t", "k"), ("index", "put", "")]
)
def test_session_refuses_names_that_are_none(
    sessions: sessionmaker[Session], outbox: Outbox, target: str, action: str, key: str
) -> None:
    with sessions() as session, pytest.raises(IntentRefused):
        outbox.emit(session, target, action, key)


def test_session_finds_a_participant_that_was_registered_later(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any], logged: Any
) -> None:
    with sessions.begin() as session:
        put(outbox, session, "a")
    admin.execute("select outbox.register('webhook')")
    with sessions.begin() as session:
        outbox.emit(session, "webhook", "post", "b", {"x": 1})
    assert logged() == ["a", "b"]


def test_session_refuses_a_mail_with_an_injected_header(sessions: sessionmaker[Session], outbox: Outbox) -> None:
    with sessions() as session:
        for to in ("a@example.org\r\nBcc: b@example.org", "a@example.org\n"):
            with pytest.raises(AddressInvalid) as caught:
                outbox.mail.send(session, sender="me@example.org", to=to, subject="s", text="t")
            assert "example.org" not in str(caught.value)


@pytest.mark.parametrize("size", [2, 4])
def test_session_refuses_a_blob_that_is_not_of_its_declared_size(
    sessions: sessionmaker[Session], outbox: Outbox, size: int, logged: Any
) -> None:
    with sessions.begin() as session:
        with pytest.raises(BlobRefused):
            outbox.blobs.put(session, b"abc", size=size)
        put(outbox, session, "good")
    assert logged() == ["good"]


def test_session_blob_is_staged_before_the_commit_and_named_by_its_transaction(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any]
) -> None:
    with sessions.begin() as session:
        blob = outbox.blobs.put(session, b"abc", size=3, name="a.txt")
        staged = list(outbox.blobs.store.stages())
    query = "select xid::text::bigint, key, payload->>'digest', payload->>'size' from outbox.log"
    row = admin.execute(query).fetchone()
    assert row is not None
    assert row[1:] == (blob.digest, blob.digest, "3")
    assert [stage.xid for stage in staged] == [row[0]]


def test_session_token_tells_whether_its_transaction_committed(sessions: sessionmaker[Session], outbox: Outbox) -> None:
    with sessions() as session:
        put(outbox, session, "a")
        session.flush()
        session.commit()
        kept = outbox.token(session)
        nested = session.begin_nested()
        put(outbox, session, "b")
        nested.commit()
        lost = outbox.token(session)
        session.rollback()
    assert kept is not None
    assert lost is not None
    with sessions() as session:
        assert outbox.committed(session, kept) is True
        assert outbox.committed(session, lost) is False


def test_session_wait_returns_when_the_participant_has_it_and_not_before(
    sessions: sessionmaker[Session], outbox: Outbox, bench: Bench
) -> None:
    with sessions.begin() as session:
        outbox.emit(session, "sink", "put", "k", {})
    with sessions() as session:
        token = outbox.token(session)
    with sessions() as session:
        outbox.emit(session, "sink", "put", "k2", {})
        session.commit()
        token = outbox.token(session)
        with pytest.raises(WaitTimeout, match="outbox status"):
            outbox.wait(session, token, "sink", timeout=0.05)
        bench.drain(bench.reader())
        outbox.wait(session, token, "sink", timeout=90)
        assert not session.in_transaction()


def test_session_works_when_attached_to_a_class_or_a_single_session(
    engine: sa.Engine, app_url: str, logged: Any, tmp_path: Path
) -> None:
    settings = Settings(app_url, tmp_path, tmp_path, "")

    class Own(Session):
        pass

    outbox = Outbox(Own, settings)
    with Own(engine) as own, own.begin():
        put(outbox, own, "a")
    with Session(engine) as single, single.begin():
        put(Outbox(single, settings), single, "b")
    assert logged() == ["a", "b"]


def test_session_i2_keeps_intents_through_a_two_phase_commit(
    server: Any, engine: sa.Engine, app_url: str, tmp_path: Path, logged: Any
) -> None:
    sessions = sessionmaker(engine, twophase=True)
    outbox = Outbox(sessions, Settings(app_url, tmp_path, tmp_path, ""))
    with sessions() as session:
        put(outbox, session, "a")
        session.add(Note(text="row"))
        session.prepare()
        session.commit()
    assert logged() == ["a"]


def test_emit_in_sql_refuses_what_the_hook_refuses(app_url: str) -> None:
    with psycopg.connect(app_url, autocommit=True) as conn:
        for arguments, state in (
            ("'nowhere', 'put', 'k'", "OB002"),
            ("'clock', 'put', 'k'", "OB002"),
            ("'index', 'P', 'k'", "OB003"),
            ("'index', 'put', ''", "OB003"),
            ("'index', 'put', null", "OB003"),
            ("'index', 'put', 'k', to_jsonb(repeat('x', 70000))", "OB003"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                conn.execute(f"select outbox.emit({arguments})")
            assert caught.value.sqlstate == state
        assert conn.execute("select outbox.emit('index', 'put', 'k')").fetchone()


def test_session_mixed_with_plain_connections_keeps_ids_rising(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any]
) -> None:
    for n in range(3):
        with sessions.begin() as session:
            put(outbox, session, f"s{n}")
        admin.execute("select outbox.emit('index', 'put', %s)", (f"p{n}",))
    ids = [row[0] for row in admin.execute("select id from outbox.log order by created_at, id")]
    assert all(a < b for a, b in itertools.pairwise(ids))


def test_session_token_is_of_the_last_transaction_only(sessions: sessionmaker[Session], outbox: Outbox) -> None:
    with sessions() as session:
        put(outbox, session, "a")
        session.commit()
        assert outbox.token(session) is not None
        session.add(Note(text="no intent"))
        session.commit()
        assert outbox.token(session) is None


def test_session_wait_refuses_a_target_that_nobody_registered(sessions: sessionmaker[Session], outbox: Outbox) -> None:
    with sessions() as session:
        put(outbox, session, "a")
        session.commit()
        with pytest.raises(UnknownTarget):
            outbox.wait(session, outbox.token(session), "indx", timeout=30)


def test_session_i2_refuses_a_connection_on_which_each_statement_commits_by_itself(
    engine: sa.Engine, sessions: sessionmaker[Session], outbox: Outbox, logged: Any, tmp_path: Path
) -> None:
    # Given a session whose rows would be committed before its intents are, or without them
    loose = sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))
    other = Outbox(loose, outbox.settings)
    # When it writes an intent, or stages a file, which the sweeper would take for one that nobody needs
    for emit in (lambda s: put(other, s, "a"), lambda s: other.blobs.put(s, b"x" * 100_000)):
        with loose() as session, pytest.raises(IntentRefused, match="AUTOCOMMIT"):
            emit(session)
    # Then it is refused, also when only this transaction is so
    with sessions() as session:
        put(outbox, session, "b")
        session.rollback()
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        put(outbox, session, "c")
        with pytest.raises(IntentRefused, match="AUTOCOMMIT"):
            session.commit()
    assert logged() == []
    assert not list((tmp_path / "blobs").rglob("*.*"))


def test_session_raises_sqlalchemys_error_when_the_connection_is_lost_and_goes_on_with_a_new_one(
    sessions: sessionmaker[Session], outbox: Outbox, admin: psycopg.Connection[Any], logged: Any
) -> None:
    with sessions() as session:
        put(outbox, session, "secret-key")
        pid = session.connection().exec_driver_sql("select pg_backend_pid()").scalar()
        admin.execute("select pg_terminate_backend(%s, 5000)", (pid,))
        with pytest.raises(sa.exc.OperationalError) as caught:
            session.commit()
        assert caught.value.connection_invalidated
        assert "secret-key" not in str(caught.value)
        session.rollback()
        put(outbox, session, "again")
        session.commit()
    assert logged() == ["again"]
