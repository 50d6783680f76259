"""The clock: when it ticks and when it doesn't, and what housekeeping keeps."""

from __future__ import annotations

import subprocess
import threading
import uuid
from typing import Any

import psycopg
import pytest

from outbox import database, era, lane, sql, tick
from outbox.errors import Fenced, NotThisLog
from tests.fixtures.lanes import Bench
from workers.clock import Clock, keep_house
from workers.postgres import Postgres


def ticks(bench: Bench) -> int:
    row = bench.admin.execute("select count(*) from outbox.tick").fetchone()
    assert row is not None
    return int(row[0])


def settle(bench: Bench) -> None:
    while bench.clock.step():
        pass


def test_clock_takes_no_ticks_when_nothing_is_written_to_the_log(bench: Bench) -> None:
    settle(bench)
    before = ticks(bench)
    bench.admin.execute("create table elsewhere (n int)")
    for n in range(5):
        bench.admin.execute("insert into elsewhere values (%s)", (n,))
        bench.clock.step()
    assert ticks(bench) <= before + 1  # the table's own transaction may have begun before the last look


def test_clock_ticks_again_when_a_transaction_ends_that_had_drawn_an_id(bench: Bench, admin: Any) -> None:
    with psycopg.connect(admin.info.dsn) as late:
        late.execute("select outbox.emit('index', 'put', 'k')")
        settle(bench)
        before = ticks(bench)
        assert not bench.clock.step()
        late.commit()
        assert bench.clock.step()
    assert ticks(bench) == before + 1
    assert not bench.clock.step()


def test_clock_i2_sees_the_sequence_never_go_back_under_traffic(server: Postgres, database: str, bench: Bench) -> None:
    """What `nextval` has in the sequence's page while it writes its WAL record is 32 ids ahead of the last one drawn.

    A tick with such a `low` hides intents: those of its successor are looked for above it.
    """
    done = threading.Event()

    def draw() -> None:
        with psycopg.connect(server.url(database=database), autocommit=True) as conn:
            while not done.is_set():
                conn.execute("select nextval('outbox.log_id') from generate_series(1, 1000)")

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        # In the server, as often as can be: it takes a few hundred thousand looks to meet the moment.
        bench.admin.execute("create temp table seen (looks int, back int)")
        bench.admin.execute(
            f"""do $$
            declare reading record; last bigint := 0; back int := 0; looks int := 0;
            begin
              while looks < 400000 loop
                execute $poll${sql.load("tick_poll")}$poll$ into reading;
                back := back + (reading.low < last)::int;
                last := reading.low;
                looks := looks + 1;
              end loop;
              insert into seen values (looks, back);
            end $$"""
        )
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert bench.admin.execute("select looks, back from seen").fetchone() == (400000, 0)


def test_clock_i6_stops_when_another_has_taken_over(bench: Bench) -> None:
    bench.admin.execute("update outbox.lane set lease_until = now() - interval '1 s' where target = 'clock'")
    owned = lane.claim(bench.conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
    assert owned is not None
    successor = Clock(bench.conn, owned)
    bench.emit("k")
    with pytest.raises(Fenced):
        bench.clock.step()
    assert successor.step()


def test_clock_gives_each_owner_a_nonce_of_its_own(bench: Bench) -> None:
    first = tick.latest(bench.conn).nonce
    bench.admin.execute("update outbox.lane set lease_until = now() - interval '1 s' where target = 'clock'")
    owned = lane.claim(bench.conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
    assert owned is not None
    Clock(bench.conn, owned)
    assert tick.latest(bench.conn).nonce != first


def test_housekeeping_keeps_the_last_tick_of_each_nonce_and_those_that_lanes_stand_at(bench: Bench) -> None:
    reader = bench.reader()
    for n in range(4):
        bench.emit(f"k{n}")
        bench.clock.step()
        if n == 1:
            bench.drain(reader)
            stood = reader.position.tick
    bench.clock._nonce = tick.new_nonce()
    for n in range(4):
        bench.emit(f"m{n}")
        bench.clock.step()
    all_ticks = bench.admin.execute("select id, nonce from outbox.tick order by id").fetchall()
    last = {nonce: number for number, nonce in all_ticks}
    bench.conn.execute("select set_config('outbox.fake_now', (now() + interval '2 h')::text, false)")
    keep_house(bench.conn, None)
    kept = {row[0] for row in bench.admin.execute("select id from outbox.tick")}
    assert kept == {*last.values(), stood}
    assert len(kept) < len(all_ticks)


def test_housekeeping_keeps_the_newest_position_of_each_lane(bench: Bench) -> None:
    reader = bench.reader()
    for n in range(5):
        bench.emit(f"k{n}")
        bench.drain(reader)
    stand = reader.lane.stand(bench.conn)
    keep_house(bench.conn, None)
    assert bench.admin.execute("select count(*) from outbox.position").fetchone() == (1,)
    assert reader.lane.stand(bench.conn) == stand


@pytest.mark.parametrize(("default", "becomes"), [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")])
def test_connection_i5_waits_for_the_disk_whatever_the_default_is(
    admin: psycopg.Connection[Any], worker_url: str, default: str, becomes: str
) -> None:
    """A tick is a durability barrier, so its commit must reach the disk."""
    admin.execute(f"alter database {admin.info.dbname} set synchronous_commit = '{default}'")
    with database.connect(worker_url, name="test") as conn:
        assert conn.execute("show synchronous_commit").fetchone() == (becomes,)


@pytest.mark.parametrize("inserts", [[], ["--inserts"]], ids=["copy", "inserts"])
def test_clock_i2_refuses_a_log_that_was_restored_from_a_dump(
    server: Postgres, bench: Bench, admin: psycopg.Connection[Any], inserts: list[str]
) -> None:
    for n in range(5):
        bench.emit(f"k{n}")
        bench.clock.step()
    dump = [str(server.binaries / "pg_dump"), *inserts, server.url(database=admin.info.dbname)]
    script = subprocess.run(dump, check=True, capture_output=True).stdout
    name = f"restored_{admin.info.dbname}"
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name}")
    try:
        psql = [str(server.binaries / "psql"), "-X", "-q", server.url(database=name)]
        subprocess.run(psql, input=script, check=True, capture_output=True)
        if inserts:
            # As on a server whose transactions have not got that far; one that has is told by what they share.
            with psycopg.connect(server.url(database=name), autocommit=True) as conn:
                conn.execute("update outbox.tick set snapshot = '9000000000:9000000000:' where id > 1")
        with psycopg.connect(server.url("outbox_worker", name), autocommit=True) as conn:
            conn.execute("select set_config('outbox.fake_now', (now() + interval '1 h')::text, false)")
            owned = lane.claim(conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
            assert owned is not None
            with pytest.raises(NotThisLog, match="restored from a dump"):
                Clock(conn, owned)
    finally:
        with psycopg.connect(server.url(), autocommit=True) as conn:
            conn.execute(f"drop database {name} with (force)")


def test_clock_goes_on_when_the_ticks_were_rewritten_by_vacuum(bench: Bench) -> None:
    for n in range(3):
        bench.emit(f"k{n}")
        bench.clock.step()
    bench.admin.execute("vacuum (full, freeze) outbox.tick")
    assert era.look(bench.conn).trouble is None
