"""A saga over a blob, the index and a mail on hold in a real Postfix, through the crash matrix: nothing half there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Saga, Settings
from outbox.blob import BlobStore
from outbox.participant import Participant
from outbox.testing import Mishap, Stage, crash_matrix
from tests.fixtures.mail import DOMAIN
from tests.fixtures.postfix import Postfix, Sink
from tests.fixtures.site import until
from workers.blob import BlobParticipant
from workers.heldmail import HeldMailParticipant
from workers.hold import HoldQueue
from workers.index import IndexParticipant
from workers.postgres import Postgres

pytestmark = pytest.mark.root


@dataclass
class File:
    path: str
    staged: dict[str, Any]


release = Saga("release", File)


@release.intent(after=(), timeout=600)
def file(run: Any) -> Any:
    return run.blobs.put(run.input.staged)


@file.undo
def unfile(run: Any) -> Any:
    return run.blobs.delete(run.results["file"]["digest"])


@release.intent(after=())
def index(run: Any) -> Any:
    return run.index.put(run.input.path, title=run.input.path)


@index.undo
def unindex(run: Any) -> Any:
    return run.index.delete(run.input.path)


@release.mail(held=True, after=())
def letter(run: Any) -> Any:
    return run.mail.send(sender="a@outbox.test", to="ann@sink.test", subject=run.input.path, text="It is out.\n")


@release.function(kind="pivot", after=(file, index, letter))
def publish(session: Session, run: Any) -> None:
    session.execute(sa.text("insert into thing values (:path, 1)"), {"path": run.input.path})


@pytest.fixture
def settings(server: Postgres, database: str, admin: psycopg.Connection[Any], tmp_path: Path) -> Settings:
    admin.execute("create table thing (name text primary key, n int); grant all on thing to app")
    blobs = tmp_path / "blobs"
    return Settings(server.url("saga", database), None, blobs, "smtp://127.0.0.1:1", mail_domain=DOMAIN)


@pytest.mark.parametrize("case", crash_matrix(release), ids=str)
def test_crash_matrix_i3_i7_of_a_saga_over_a_blob_the_index_and_a_mail_on_hold(
    case: Mishap, settings: Settings, admin: psycopg.Connection[Any], tmp_path: Path, relay: Postfix, sink: Sink
) -> None:
    # Given: a file that is staged, and participants as they run in production
    sink.messages.clear()
    assert isinstance(settings.blobs, Path)
    store = BlobStore(settings.blobs)
    engine = sa.create_engine(settings.sqlalchemy_url, poolclass=sa.NullPool)
    sessions = sessionmaker(engine)
    outbox = Outbox(sessions, settings)
    with sessions.begin() as session:
        staged = outbox.blobs.stage(session, b"a file")
    participants: dict[str, Callable[[], Participant]] = {
        "blob": lambda: BlobParticipant(store),
        "index": lambda: IndexParticipant(tmp_path / "index"),
        "mail": lambda: HeldMailParticipant(relay.hold_url, HoldQueue(relay.etc, "postsuper", settle=0.2), DOMAIN),
    }

    def check(state: str) -> None:
        """What a user finds at each participant."""
        completed = state == "completed"
        assert [item.key for item in participants["index"]().inventory()] == (["a"] if completed else [])
        assert [item.key for item in participants["blob"]().inventory()] == ([staged["digest"]] if completed else [])
        assert admin.execute("select count(*) from thing").fetchone() == (int(completed),)
        until(lambda: relay.queue() == [], "nothing is left in Postfix's queue, and nothing on hold")
        row = admin.execute("select result ->> 'token' from outbox.saga_step where step = 'letter'").fetchone()
        assert row is not None
        until(lambda: len(sink.arrived().get(row[0], ())) == int(completed), "the mail has come, or has not")

    # When: one thing goes wrong
    ended = case(Stage(settings, File("a", staged), participants, check))
    # Then: all of it is there, or nothing, which `check` saw; and it was not given up without a reason
    forward = case.what in ("nothing", "fail after", "crash", "engine") or case.step == "letter.release"
    if case.what not in ("cancel", "time out"):
        assert ended == ("completed" if forward else "compensated")
