"""What becomes of a database, and how its lanes notice."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import adoption, era, lane, tick
from outbox.blob import BlobStore
from outbox.errors import Fenced, NotReady, NotThisLog, WentBack
from outbox.settings import Settings
from outbox.watermark import Watermark
from tests.fixtures.lanes import TARGET, Bench
from tests.fixtures.site import until
from tests.integration.test_adopt import adopt, claims_elsewhere, hop, moved
from workers import clock, process
from workers.clock import Clock
from workers.postgres import Postgres

Conn = psycopg.Connection[Any]
__all__ = ["moved"]


def _upgraded(admin: Conn) -> None:
    admin.execute("update outbox.era set server = '1'")


def _promoted(admin: Conn) -> None:
    admin.execute("update outbox.era set timeline = '0000002A'")


def _halted(admin: Conn) -> None:
    era.halt(admin, "somebody has seen more")


@pytest.mark.parametrize(
    ("change", "says"),
    [(_upgraded, "pg_upgrade"), (_promoted, "standby that was promoted"), (_halted, "somebody has seen more")],
)
def test_history_i2_stops_a_clock_and_lanes_at_work_and_goes_on_when_adopted(
    server: Postgres, bench: Bench, change: Callable[[Conn], None], says: str
) -> None:
    # Given a clock and a lane at work, a transaction that is open, and one that has an xid and no intent yet
    bench.clock._nonce_at = 0.0
    reader = bench.reader()
    bench.emit("a", 1)
    bench.drain(reader)
    bench.emit("a", 2)
    app = psycopg.connect(server.url("app", bench.admin.info.dbname))
    app.execute("select pg_current_xact_id()")
    # When the history changes under them
    change(bench.admin)
    # Then what they ask with the next tick or renewal refuses; and a new owner is told why (of another server, a
    # connection that is open knows)
    if change is not _upgraded:
        with pytest.raises((NotThisLog, Fenced)):
            bench.drain(reader)
        with pytest.raises(Fenced):
            reader.lane.renew(bench.conn)
    with pytest.raises(NotThisLog, match=says) as refused:
        era.check(bench.conn)
    assert "outbox adopt" in str(refused.value)
    # ... and while a lane is owned, nothing is adopted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adoption, "PATIENCE", 0.0)
        with pytest.raises(NotReady, match="a worker owns a lane"):
            adopt(server, bench.admin.info.dbname)
    claims_elsewhere(bench.admin)
    assert adopt(server, bench.admin.info.dbname).not_done == 1
    app.execute("select outbox.emit(%s, 'put', 'b', '1')", (TARGET,))
    app.commit()
    app.close()
    with pytest.raises(NotReady, match="nothing to adopt"):
        adopt(server, bench.admin.info.dbname)
    with pytest.raises(Fenced):
        reader.lane.renew(bench.conn)
    owned = lane.claim(bench.conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
    assert owned is not None
    bench.clock = Clock(bench.conn, owned)
    bench.drain(bench.reader())
    assert bench.sink.effects == [("a", 1), ("a", 2), ("b", 1)]


@pytest.mark.parametrize(
    "change",
    [
        "update outbox.era set relation = relation + 1",
        "update outbox.tick set low = low",
        "update outbox.tick set snapshot = '99999999999:99999999999:' where id = (select max(id) from outbox.tick)",
    ],
    ids=["another table", "all ticks are of one transaction", "a tick of the future"],
)
def test_history_i2_knows_a_restored_dump_by_each_of_its_signs(bench: Bench, change: str) -> None:
    bench.clock.step()
    era.check(bench.conn)
    bench.admin.execute(change.encode())
    with pytest.raises(NotThisLog, match="restored from a dump"):
        era.check(bench.conn)


def test_history_keeps_the_first_reason_when_an_era_is_halted_again(bench: Bench) -> None:
    era.halt(bench.conn, "the first")
    era.halt(bench.conn, "what came of it")
    trouble = era.look(bench.conn).trouble
    assert trouble is not None
    assert trouble.says == "the first"


def test_history_i2_stops_at_a_copy_of_a_database_that_was_drained_and_not_at_one_of_an_unused_one(
    server: Postgres, bench: Bench, moved: list[str]
) -> None:
    name = f"copy_of_{bench.admin.info.dbname}"
    source = bench.admin.info.dbname
    bench.close()
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name} template {source}")
    try:
        with (
            psycopg.connect(server.url("outbox_worker", name), autocommit=True) as worker,
            pytest.raises(NotThisLog, match="copied from another one of this server"),
        ):
            era.check(worker)
    finally:
        with psycopg.connect(server.url(), autocommit=True) as conn:
            conn.execute(f"drop database {name}")


def test_watermark_stops_what_goes_back_and_a_copy_of_its_directory(bench: Bench, tmp_path: Path) -> None:
    # Given what a worker has noted of where it is
    state = tmp_path / "state"
    reader = bench.reader()
    bench.emit("a")
    bench.drain(reader)
    Watermark(state, "sink/0").note(reader.position)
    check = era.check(bench.conn)
    Watermark(state, "mail/0").check(bench.conn, check)
    # ... and one that has seen another database's log, which is that one's affair
    other = reader.position._replace(log="f" * 16)
    Watermark(state, "sink/0").note(other)
    Watermark(state, "mail/0").check(bench.conn, check)
    # When its directory is copied, then the copy is not believed, and the original is
    shutil.copytree(state, tmp_path / "copy")
    with pytest.raises(NotThisLog, match="is a copy"):
        Watermark(tmp_path / "copy").check(bench.conn, check)
    state.rename(tmp_path / "moved")
    moved_to = Watermark(tmp_path / "moved")
    moved_to.check(bench.conn, check)
    # When the log goes back, and on with other ticks, then nobody goes on
    bench.admin.execute("delete from outbox.tick where id >= %s", (reader.position.tick,))
    with pytest.raises(WentBack, match="was seen"):
        moved_to.check(bench.conn, check)
    bench.emit("b")
    bench.clock._nonce = tick.new_nonce()
    bench.clock.step()
    bench.clock.step()
    with pytest.raises(WentBack, match="outbox adopt"):
        moved_to.check(bench.conn, check)
    # ... until it is adopted: what was seen before counts no more
    claims_elsewhere(bench.admin)
    with psycopg.connect(bench.admin.info.dsn, autocommit=True) as conn:
        adopted = adoption.adopt(conn, adoption.plan(conn, moved_to))
    assert adopted.era == 2
    for mark in (moved_to, Watermark(tmp_path / "copy")):
        mark.check(bench.conn, era.check(bench.conn))


def test_watermark_of_a_lane_that_is_gone_says_nothing_when_the_log_goes_back_to_a_later_tick(
    bench: Bench, tmp_path: Path
) -> None:
    # Given an old note, at a tick that was thinned
    bench.clock.step()
    Watermark(tmp_path, "gone/0").note(bench.clock.position)
    bench.emit("a")
    bench.clock.step()
    bench.admin.execute("delete from outbox.tick where id > 1 and id < %s", (bench.clock.position.tick,))
    Watermark(tmp_path).check(bench.conn, era.check(bench.conn))
    # When retention has dropped that part of the log, with the ticks by which it could be matched
    bench.admin.execute("update outbox.tick set nonce = 'ffffffffffffffff'")
    bench.admin.execute("update outbox.horizon set tick = %s", (bench.clock.position.tick,))
    # Then it is not looked for
    Watermark(tmp_path).check(bench.conn, era.look(bench.conn))


def test_housekeeping_i2_sweeps_nothing_in_a_copy_of_the_database(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str], tmp_path: Path
) -> None:
    # Given a staged file of a transaction that the copy knows nothing of
    log = era.identity(bench.admin)
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    store = BlobStore(tmp_path / "blobs")
    store.stage(b"needed", xid=3, log=log)
    # When a clock is started for the copy, with the same store, and there was time for many rounds
    settings = Settings(database=elsewhere.url("outbox_worker", name), index=None, blobs=tmp_path / "blobs", smtp="")
    stop = Rounds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "HOUSE_EVERY", 0.01)
        thread = threading.Thread(target=process.run_clock, args=(settings, stop))
        thread.start()
        try:
            until(lambda: stop.rounds > 30, "rounds of housekeeping")
        finally:
            stop.set()
            thread.join()
    # Then the file is still there
    assert [stage.xid for stage in store.stages()] == [3]


class Rounds(threading.Event):
    """Counts how often the housekeeping has waited for its next round."""

    rounds = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.rounds += threading.current_thread().name == "housekeeping"
        return super().wait(timeout)
