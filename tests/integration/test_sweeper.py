"""The sweeper, with real transactions: a staged file goes exactly when nothing can need it any more."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.blob import BlobStore, Staged
from outbox.intent import Intent
from outbox.participant import LaneView, Verdict
from outbox.s3 import S3Store
from workers.blob import BlobParticipant
from workers.sweeper import BATCH, Swept, sweep

Connection = psycopg.Connection[Any]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def app(app_url: str) -> Iterator[Connection]:
    with psycopg.connect(app_url) as conn:
        yield conn
        conn.rollback()


@pytest.fixture
def log(worker: Connection) -> str:
    return str(one(worker, "select log from outbox.identity"))


def one(conn: Connection, query: Any, *parameters: Any) -> Any:
    row = conn.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def stage(app: Connection, store: BlobStore, log: str, content: bytes = b"content") -> Staged:
    """In the transaction of `app`, as the application does it."""
    return store.stage(content, xid=int(one(app, "select pg_current_xact_id()::text")), log=log)


def emit(app: Connection, staged: Staged, target: str = "blob", payload: Any = None) -> int:
    body = json.dumps(payload or staged.payload())
    return int(one(app, "select outbox.emit(%s, 'put', %s, %s::jsonb)", target, staged.digest, body))


def apply(store: BlobStore, conn: Connection, *, settle: bool = False) -> list[Verdict]:
    """What the worker does with all of the log."""
    rows = conn.execute(
        "select id, target, action, key, payload::text from outbox.log where target = 'blob' order by id"
    ).fetchall()
    batch = [Intent(*row) for row in rows]
    participant = BlobParticipant(store)
    participant.open(LaneView("blob", 0, 1, unclean=False))
    verdicts = [outcome.verdict for outcome in participant.apply(batch, None)]
    if settle:
        participant.settle(batch)
    participant.close()
    return verdicts


def pass_lane(admin: Connection, target: str = "blob") -> None:
    """Move the target's lane behind everything that is committed."""
    admin.execute(
        "with t as (insert into outbox.tick (id, floor, low, high, snapshot, nonce) "
        "select max(id) + 1, 0, 0, 0, pg_current_snapshot(), '0123456789abcdef' from outbox.tick returning id) "
        "insert into outbox.position (target, lane, epoch, tick) select %s, 0, 1, id from t",
        (target,),
    )


def stages(store: BlobStore) -> set[str]:
    return {found.name for found in store.stages()}


def test_sweeper_does_nothing_without_a_store(worker: Connection, store: BlobStore, log: str) -> None:
    assert sweep(worker, store, log=log, trash_age=0) == Swept()


def test_sweeper_removes_at_once_what_was_rolled_back(
    worker: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    stage(app, store, log)
    app.rollback()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(aborted=1)
    assert stages(store) == set()


def test_sweeper_keeps_what_is_running_or_prepared(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    running = stage(app, store, log)
    assert sweep(worker, store, log=log, trash_age=0) == Swept(running=1)  # it is the newest
    one(admin, "select pg_current_xact_id()::text")
    assert sweep(worker, store, log=log, trash_age=0) == Swept(running=1)  # a newer one is over
    emit(app, running)
    app.execute("prepare transaction 'blob'")
    app.rollback()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(running=1)
    admin.execute("commit prepared 'blob'")
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)
    assert apply(store, admin) == [Verdict.APPLIED]


def test_sweeper_i2_judges_transaction_and_intents_by_one_snapshot(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    staged = stage(app, store, log)
    emit(app, staged)
    one(admin, "select pg_current_xact_id()::text")  # a newer transaction is over: ours lies inside the snapshot
    worker.execute("begin isolation level repeatable read")
    one(worker, "select pg_current_snapshot()::text")
    app.commit()
    # pg_xact_status knows of the commit, and the snapshot can't see the intent.
    assert one(worker, "select pg_xact_status(%s::xid8)", str(next(store.stages()).xid)) == "committed"
    assert sweep(worker, store, log=log, trash_age=0) == Swept(running=1)
    worker.execute("rollback")
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)


def test_sweeper_removes_what_a_savepoint_rolled_back_and_nothing_else(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    outer = stage(app, store, log, b"outer")
    emit(app, outer)
    with app.transaction(force_rollback=True):
        emit(app, stage(app, store, log, b"inner"))
    assert sweep(worker, store, log=log, trash_age=0) == Swept(running=2)
    app.commit()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(unused=1, pending=1)
    assert stages(store) == {outer.stage}
    assert apply(store, admin) == [Verdict.APPLIED]
    assert store.verify(outer.digest)


def test_sweeper_i2_keeps_the_file_when_the_reply_to_commit_was_lost(
    worker: Connection, admin: Connection, app_url: str, store: BlobStore, log: str
) -> None:
    app = psycopg.connect(app_url)
    staged = stage(app, store, log)
    emit(app, staged)
    xid = str(next(store.stages()).xid)
    # The request goes out, and nobody is there for the reply.
    app.pgconn.send_query(b"commit")
    while one(worker, "select pg_xact_status(%s::xid8)", xid) != "committed":
        assert app.pgconn.flush() == 0
    app.close()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)
    assert apply(store, admin) == [Verdict.APPLIED]
    assert store.verify(staged.digest)


def test_sweeper_removes_what_a_killed_worker_left_behind(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    staged = stage(app, store, log)
    emit(app, staged)
    app.commit()
    assert apply(store, admin) == [Verdict.APPLIED]
    # Published, but the position isn't durable: the batch may come again.
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)
    pass_lane(admin)
    assert sweep(worker, store, log=log, trash_age=0) == Swept(done=1)
    assert apply(store, admin) == [Verdict.APPLIED]
    assert store.verify(staged.digest)


def test_sweeper_keeps_a_second_put_though_the_first_one_is_published(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    first = stage(app, store, log)
    emit(app, first)
    app.commit()
    assert apply(store, admin, settle=True) == [Verdict.APPLIED]
    pass_lane(admin)
    # Deleted and put again, neither applied yet: the object is there, and the second stage is needed all the same.
    app.execute("select outbox.emit('blob', 'delete', %s)", (first.digest,))
    second = stage(app, store, log)
    emit(app, second)
    app.commit()
    assert store.exists(first.digest)
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)
    assert apply(store, admin) == [Verdict.APPLIED] * 3
    assert store.verify(second.digest)


def test_sweeper_keeps_what_is_parked_until_it_is_resolved(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    number = emit(app, stage(app, store, log))
    app.commit()
    pass_lane(admin)
    admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason) values (%s, 'blob', 0, 'key', 'blocked')", (number,)
    )
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1)
    admin.execute("delete from outbox.parked")
    assert sweep(worker, store, log=log, trash_age=0) == Swept(done=1)


def test_sweeper_keeps_what_a_saga_or_another_participant_names(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    deep = stage(app, store, log)
    emit(app, deep, "mail", {"steps": [1, "two", {"input": deep.payload()}], "stage": 3})
    app.commit()
    other = stage(app, store, log)
    emit(app, other, "mail")
    app.commit()
    pass_lane(admin)
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=2)
    pass_lane(admin, "mail")
    assert sweep(worker, store, log=log, trash_age=0) == Swept(pending=1, done=1)
    assert stages(store) == {deep.stage}


def test_sweeper_keeps_what_is_foreign(worker: Connection, store: BlobStore, log: str) -> None:
    store.stage(b"x", xid=7, log="f" * 16)
    store.stage(b"x", xid=10**15, log=log)  # this database has not come that far: it was restored
    assert sweep(worker, store, log=log, trash_age=0) == Swept(foreign=2)
    assert len(stages(store)) == 2


def test_sweeper_takes_a_transaction_too_old_to_know_as_committed(
    worker: Connection, store: BlobStore, log: str
) -> None:
    store.stage(b"x", xid=3, log=log)
    assert one(worker, "select pg_xact_status('3'::xid8)") is None
    assert sweep(worker, store, log=log, trash_age=0) == Swept(unused=1)


def test_sweeper_asks_in_batches(
    worker: Connection, admin: Connection, app: Connection, store: BlobStore, log: str
) -> None:
    xid = int(one(app, "select pg_current_xact_id()::text"))
    store.make()
    count = 2 * BATCH + 1
    names = [f"{log}-{xid}-{number:032x}" for number in range(count)]
    for name in names:
        (store.directory / "staging" / name).touch()
    kept = names[::2]
    app.execute(
        "insert into outbox.log (target, action, key, payload) "
        "select 'blob', 'put', name, jsonb_build_object('stage', name) from unnest(%s::text[]) as name",
        (kept,),
    )
    app.commit()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(unused=BATCH, pending=BATCH + 1)
    assert stages(store) == set(kept)


def test_sweeper_s3_keeps_what_a_running_transaction_uploads_and_removes_it_when_that_is_aborted(
    worker: Connection, app: Connection, s3: S3Store, log: str
) -> None:
    # Given: an upload that is not complete, and a staged object, of one transaction; and somebody else's upload
    xid = int(one(app, "select pg_current_xact_id()::text"))
    staged = s3.stage(b"content", xid=xid, log=log)
    key = f"staging/{log}-{xid}-{'0' * 32}"
    for place in (key, "staging/README"):
        s3.bucket.client.create_multipart_upload(**s3.bucket.where(place))
    # When: it runs
    # Then: both stay
    assert sweep(worker, s3, log=log, trash_age=3600) == Swept(running=2)
    assert {stage.name for stage in s3.stages()} == {staged.stage, key.removeprefix("staging/")}
    # When: it is rolled back
    app.rollback()
    # Then: both go, and what isn't ours stays
    assert sweep(worker, s3, log=log, trash_age=3600) == Swept(aborted=2)
    assert list(s3.stages()) == []
    assert [upload.key for upload in s3.bucket.uploads("")] == ["staging/README"]


def test_sweeper_purges_old_trash(worker: Connection, store: BlobStore, log: str) -> None:
    store.make()
    (store.directory / "trash" / f"1-2-{'a' * 64}").touch()
    assert sweep(worker, store, log=log, trash_age=3600) == Swept()
    assert sweep(worker, store, log=log, trash_age=0) == Swept(trash=1)
    assert os.listdir(store.directory / "trash") == []
