"""Two ordinary moments in which a library that ties files to the session loses committed ones, and this one doesn't.

A SAVEPOINT that is rolled back inside a transaction that commits, and a COMMIT that is applied while its reply is lost.
Beside ours, sqlalchemy-file does what it does then: a session can't know better.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Settings
from outbox.blob import BlobStore
from outbox.errors import BlobRefused, NotReady
from outbox.settings import INLINE_MOST
from tests.fixtures.site import LIMIT, Site, until
from workers.sweeper import sweep

OUTER, INNER = b"outer", b"inner"


class Cut(psycopg.Connection[Any]):
    """A connection that is cut when COMMIT has been applied, before its reply."""

    armed = False

    def commit(self) -> None:
        if not Cut.armed:
            return super().commit()
        Cut.armed = False
        xid = self.execute("select pg_current_xact_id()::text").fetchone()
        with psycopg.connect(self.info.dsn, autocommit=True) as other:
            # The request goes out, and nobody is there for the reply.
            self.pgconn.send_query(b"commit")
            while other.execute("select pg_xact_status(%s::xid8)", xid).fetchone() != ("committed",):
                self.pgconn.flush()
        self.pgconn.finish()
        raise psycopg.OperationalError("the connection was lost")


def engine(url: str) -> sa.Engine:
    """Connections of it can be cut."""
    return sa.create_engine("postgresql+psycopg://", creator=lambda: Cut.connect(url), poolclass=sa.NullPool)


@pytest.fixture
def sessions(app_url: str) -> sessionmaker[Session]:
    return sessionmaker(engine(app_url))


@pytest.fixture
def outbox(sessions: sessionmaker[Session], site: Site, app_url: str) -> Outbox:
    return Outbox(sessions, Settings(app_url, site.home / "index", site.home / "blobs", "smtp://127.0.0.1:1"))


def drained(site: Site, worker: psycopg.Connection[Any]) -> dict[str, int]:
    """Let worker and sweeper do all they have to do. → the digests that are published, and their sizes."""
    store = BlobStore(site.home / "blobs")
    clock = site.start("clock")
    assert site.start("blob", "--until-idle").wait(LIMIT) == 0
    log = str(site.one("select log from outbox.identity"))

    def swept() -> bool:
        sweep(worker, store, log=log, trash_age=0)
        return not list(store.stages())

    until(swept, "what was staged is published or removed")
    clock.terminate()
    assert clock.wait(LIMIT) == 0
    assert site.one("select count(*) from outbox.parked") == 0
    return {blob.digest: blob.size for blob in store.inventory() if store.verify(blob.digest)}


def published(*contents: bytes) -> dict[str, int]:
    return {hashlib.sha256(content).hexdigest(): len(content) for content in contents}


def test_blob_i2_is_kept_when_a_later_savepoint_is_rolled_back(
    site: Site, worker: psycopg.Connection[Any], sessions: sessionmaker[Session], outbox: Outbox
) -> None:
    # Given: a blob in a transaction, and another one in a SAVEPOINT that fails
    with sessions.begin() as session:
        outbox.blobs.put(session, OUTER)
        with pytest.raises(ValueError, match="inside"), session.begin_nested():
            outbox.blobs.put(session, INNER)
            raise ValueError("inside")
    # When: the transaction has committed
    # Then: the one is there, and the other isn't
    assert drained(site, worker) == published(OUTER)


def test_blob_i2_is_kept_when_the_reply_to_commit_is_lost(
    site: Site, worker: psycopg.Connection[Any], sessions: sessionmaker[Session], outbox: Outbox
) -> None:
    # Given: an application that is told that its COMMIT failed, and rolls back
    session = sessions()
    outbox.blobs.put(session, OUTER)
    Cut.armed = True
    with pytest.raises(sa.exc.OperationalError, match="lost"):
        session.commit()
    token = outbox.token(session)
    session.rollback()
    session.close()
    # When: it asks Postgres
    with sessions() as asking:
        assert token is not None
        assert outbox.committed(asking, token)
    # Then: the blob is there, as its row would be
    assert drained(site, worker) == published(OUTER)


def test_blob_small_ones_travel_in_the_intent_and_larger_ones_are_staged(
    site: Site, worker: psycopg.Connection[Any], sessions: sessionmaker[Session], app_url: str
) -> None:
    # Given: blobs up to 10 bytes are to travel in Postgres
    settings = Settings(app_url, None, site.home / "blobs", "smtp://127.0.0.1:1", blob_inline=10)
    outbox = Outbox(sessions, settings)
    with sessions.begin() as session:
        # When: blobs of that size and around it are put, from each kind of source
        for source in (b"", io.BytesIO(b"0123456789")):
            outbox.blobs.put(session, source)
        assert list(outbox.blobs.store.stages()) == []
        for source in (b"0123456789a", io.BytesIO(b"0123456789b"), io.BytesIO(b"c" * 3_000_000)):
            outbox.blobs.put(session, source)
        assert len(list(outbox.blobs.store.stages())) == 3
        with pytest.raises(BlobRefused, match="declared 4"):
            outbox.blobs.put(session, b"abc", size=4)
    # Then: all of them are published
    contents = (b"", b"0123456789", b"0123456789a", b"0123456789b", b"c" * 3_000_000)
    assert drained(site, worker) == published(*contents)
    assert site.one("select count(*) from outbox.log where payload ? 'bytes'") == 2


@pytest.mark.parametrize("text", ["45001", "-1", "1.5", "ten"])
def test_blob_inline_that_no_payload_can_hold_is_refused(text: str) -> None:
    with pytest.raises(NotReady, match="up to 45,000"):
        Settings.load(env={"OUTBOX_DATABASE": "postgresql://u@h/d", "OUTBOX_BLOB_INLINE": text})


def test_blob_inline_of_the_largest_size_fits_a_payload(
    site: Site, worker: psycopg.Connection[Any], sessions: sessionmaker[Session], app_url: str
) -> None:
    outbox = Outbox(
        sessions, Settings(app_url, None, site.home / "blobs", "smtp://127.0.0.1:1", blob_inline=INLINE_MOST)
    )
    content = bytes(range(256)) * 176
    with sessions.begin() as session:
        outbox.blobs.put(session, content[:INLINE_MOST], name="n" * 2000, type="application/octet-stream")
    assert site.one("select count(*) from outbox.log where payload ? 'bytes'") == 1
    assert drained(site, worker) == published(content[:INLINE_MOST])


# ---------------------------------------------------------------------------------------------- beside it

THEIRS = """
import json, os, sys, warnings
import sqlalchemy as sa
from libcloud.storage.drivers.local import LocalStorageDriver
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy_file import File, FileField
from sqlalchemy_file.storage import StorageManager
from tests.integration.test_blob_session import Cut, engine

url, folder, what = sys.argv[1:]
os.mkdir(folder + "/files")
StorageManager.add_storage("default", LocalStorageDriver(folder).get_container("files"))

class Base(DeclarativeBase):
    pass

class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    content = mapped_column(FileField)

bind = engine(url)
Base.metadata.create_all(bind)
session = sessionmaker(bind)()
session.add(Document(content=File(content=b"outer")))
session.flush()
if what == "savepoint":
    session.begin_nested().rollback()
    session.commit()
else:
    Cut.armed = True
    try:
        session.commit()
    except sa.exc.OperationalError:
        session.rollback()
session.close()
with bind.connect() as conn:
    rows = conn.execute(sa.text("select count(*) from document")).scalar()
print(json.dumps([rows, len(os.listdir(folder + "/files"))]))
"""


@pytest.mark.parametrize("what", ["savepoint", "reply"])
def test_library_that_ties_files_to_the_session_loses_a_committed_one(app_url: str, tmp_path: Path, what: str) -> None:
    # Given: the same two moments, with sqlalchemy-file
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THEIRS, app_url, str(tmp_path), what],
        check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT,
    )  # fmt: skip
    # Then: the row is there, and its file is gone
    assert json.loads(done.stdout) == [1, 0]
