"""`outbox status`: what a person sees, and what a program gets."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from outbox.cli import main
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.status import read
from tests.fixtures.lanes import TARGET, Bench
from workers.postgres import Postgres


@pytest.fixture
def status(bench: Bench, worker_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("OUTBOX_DATABASE", worker_url)

    def run(*words: str) -> str:
        assert main(["status", *words]) == 0
        return capsys.readouterr().out

    return run


def lane(picture: dict[str, Any], name: str = "sink/0") -> dict[str, Any]:
    return next(found for found in picture["lanes"] if f"{found['target']}/{found['lane']}" == name)


def test_status_counts_what_is_behind_and_since_when(bench: Bench, status: Any) -> None:
    for n in range(3):
        bench.emit(f"k{n}")
    bench.clock.step()
    picture = json.loads(status("--json"))
    assert lane(picture)["behind"] == 3
    assert lane(picture)["lag_seconds"] > 0
    assert any("nobody drains it" in warning for warning in picture["warnings"])
    bench.drain(bench.reader())
    picture = json.loads(status("--json"))
    assert lane(picture)["behind"] == 0
    assert lane(picture)["lag_seconds"] is None
    assert lane(picture)["owned"]
    assert lane(picture)["epoch"] == 1


def test_status_counts_in_the_middle_of_a_batch(bench: Bench, status: Any) -> None:
    bench.sink.batch_limit = 10
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) "
        "select 'sink', 'put', 'k' || n, '{}' from generate_series(1, 35) n"
    )
    bench.clock.step()
    bench.reader().step()
    picture = lane(json.loads(status("--json")))
    assert picture["behind"] == 25
    assert "@10" in picture["position"]


def test_status_shows_what_is_parked_by_reason(bench: Bench, status: Any) -> None:
    bench.sink.fate["bad"] = Outcome(Verdict.POISON, error="never")
    bench.emit("bad")
    bench.emit("bad")
    bench.drain(bench.reader(backoff=Backoff(first=3600, limit=3600)))
    parked = {(p["target"], p["reason"]): p["count"] for p in json.loads(status("--json"))["parked"]}
    assert parked == {("sink", "poison"): 1, ("sink", "blocked"): 1}
    assert "poison" in status()


def test_status_shows_the_open_transaction_that_holds_its_own_intents_back(
    server: Postgres, database: str, bench: Bench, status: Any
) -> None:
    with psycopg.connect(server.url(database=database), application_name="slow importer") as slow:
        slow.execute("select outbox.emit('sink', 'put', 'held')")
        (holder,) = json.loads(status("--json"))["holders"]
        assert holder["pid"] == slow.info.backend_pid
        assert "own intents wait" in status()
        slow.rollback()
    assert json.loads(status("--json"))["holders"] == []


def test_status_shows_a_forgotten_prepared_transaction(
    server: Postgres, database: str, bench: Bench, status: Any
) -> None:
    with psycopg.connect(server.url(database=database)) as conn:
        conn.tpc_begin("forgotten")
        conn.execute("select outbox.emit('sink', 'put', 'held')")
        conn.tpc_prepare()
        assert [h["prepared"] for h in json.loads(status("--json"))["holders"]] == ["forgotten"]
        conn.tpc_rollback()


def test_status_says_that_no_clock_runs_and_what_to_do(bench: Bench, status: Any) -> None:
    assert "clock runs" in status()
    bench.clock.lane.release(bench.conn)
    assert "run `outbox work clock`" in status()


def test_status_shows_why_a_lane_waits(bench: Bench, status: Any) -> None:
    owned = bench.claim()
    owned.show(bench.conn, "waiting", "the disk is full: make room")
    assert "sink/0 waits: the disk is full: make room" in status()


def test_status_works_with_a_readers_rights(server: Postgres, database: str, bench: Bench) -> None:
    bench.admin.execute("set role outbox_reader")
    assert {lane["target"] for lane in read(bench.admin).lanes} == {"index", "blob", "mail", "saga", TARGET}
    bench.admin.execute("reset role")


def test_status_is_one_clear_line_when_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", f"postgresql://x@/x?host={tmp_path}")
    assert main(["status"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "can't be reached" in errors
    monkeypatch.delenv("OUTBOX_DATABASE")
    assert main(["status", "--state", str(tmp_path)]) == 1
    assert "Run `outbox up`" in capsys.readouterr().err
