"""The schema: who may do what, that it is migrated whole or not at all, and that SQL and code agree."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import database, migrate
from outbox.cli import main
from outbox.errors import DatabaseNewer, NotMigrated, NotReady
from outbox.intent import KEY_LIMIT, PAYLOAD_LIMIT
from workers.postgres import Postgres


@pytest.fixture
def empty(server: Postgres, request: pytest.FixtureRequest) -> Any:
    """The name of a database with nothing in it."""
    name = f"empty_{abs(hash(request.node.name)) % 10**8}"
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name} owner app")
        yield name
        conn.execute(f"drop database {name} with (force)")


def test_migration_brings_an_empty_database_to_head_and_again_does_nothing(server: Postgres, empty: str) -> None:
    assert migrate.upgrade(server.url(database=empty)) == (None, database.HEAD)
    assert migrate.upgrade(server.url(database=empty)) == (database.HEAD, database.HEAD)


def test_migration_head_is_what_the_code_expects() -> None:
    newest = max(path.stem.split("_")[0] for path in (database.migrations() / "versions").glob("*.py"))
    assert newest == database.HEAD


def test_migration_as_sql_makes_the_same_schema(server: Postgres, empty: str, template: str, tmp_path: Path) -> None:
    script = tmp_path / "outbox.sql"
    script.write_text(migrate.script(), encoding="utf-8")
    psql = [str(server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(script)]
    subprocess.run([*psql, server.url(database=empty)], check=True, capture_output=True)

    def dump(name: str) -> list[str]:
        command = [str(server.binaries / "pg_dump"), "--schema=outbox", "--schema-only", server.url(database=name)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [line for line in text.splitlines() if not line.startswith(("--", "\\"))]

    assert dump(empty) == dump(template)


def test_migration_runs_once_when_two_start_together(server: Postgres, empty: str) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(migrate.upgrade(server.url(database=empty)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [(database.HEAD, database.HEAD), (None, database.HEAD)]


def test_migration_refuses_a_database_that_is_newer(server: Postgres, database_newer: str) -> None:
    with pytest.raises(DatabaseNewer, match="upgrade the outbox package"):
        migrate.upgrade(database_newer)
    with pytest.raises(DatabaseNewer):
        database.connect(database_newer, name="test")


@pytest.fixture
def database_newer(server: Postgres, database: str, admin: psycopg.Connection[Any]) -> str:
    admin.execute("update outbox.alembic_version set version_num = '9999'")
    return server.url(database=database)


def test_migration_says_what_to_do_when_the_user_may_not(server: Postgres, empty: str) -> None:
    with pytest.raises(NotReady, match="outbox migrate --sql"):
        migrate.upgrade(server.url("outbox_worker", empty))


def test_connect_says_what_to_do_when_the_database_is_not_migrated(server: Postgres, empty: str) -> None:
    with pytest.raises(NotMigrated, match="run `outbox migrate`"):
        database.connect(server.url(database=empty), name="test")


def test_migrate_command_checks_migrates_and_prints(
    server: Postgres, empty: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", server.url(database=empty))
    assert main(["migrate", "--check"]) == 1
    assert "run `outbox migrate`" in capsys.readouterr().err
    assert main(["migrate"]) == 0
    assert main(["migrate", "--check"]) == 0
    assert main(["migrate", "--sql"]) == 0
    assert "create table outbox.log" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- rights

#: statement → the roles that may run it; nobody else.
RIGHTS = {
    "insert into outbox.log (target, action, key, payload) values ('index', 'put', 'k', '{}')": {"app"},
    "insert into outbox.log (xid, target, action, key, payload) values ('1', 'index', 'put', 'k', '{}')": set(),
    "insert into outbox.log (id, target, action, key, payload) values (1, 'index', 'put', 'k', '{}')": set(),
    "select outbox.emit('index', 'put', 'k')": {"app"},
    "select outbox.reached('1', 'index')": {"app", "worker", "operator", "reader"},
    "select payload from outbox.log": {"worker", "operator", "reader"},
    "update outbox.log set key = 'x'": set(),
    "delete from outbox.log": set(),
    "truncate outbox.log": set(),
    "delete from outbox.log_000000": set(),
    "select outbox.add_partitions(1)": {"worker"},
    "select outbox.register('other')": {"operator"},
    "delete from outbox.tick": {"worker"},
    "update outbox.tick set high = 1": set(),
    "update outbox.lane set epoch = 5": {"worker"},
    "update outbox.lane set slot_low = 5": set(),
    "delete from outbox.position": {"worker"},
    "update outbox.position set tick = 5": set(),
    "delete from outbox.parked": {"worker"},
    "update outbox.parked set retry_at = null": {"worker"},
    "select outbox.decide('retry', '{1}')": {"operator"},
    "select outbox.objection('retry', null)": set(),
    "insert into outbox.audit (action, intent, target, reason) values ('retry', 1, 'index', 'retry')": set(),
    "select * from outbox.audit": {"worker", "operator", "reader"},
    "select * from outbox.receipt": {"worker", "operator", "reader"},
    "select * from outbox.lane": {"worker", "operator", "reader"},
    "select * from outbox.postmark, outbox.postmark_watch": {"worker", "operator", "reader"},
    f"insert into outbox.postmark (token, part, queue_id) values ('{'a' * 32}', '', 'q')": set(),
    f"select outbox.put_postmarks(array['{'a' * 32}'], array[''], 'q')": {"worker"},
    "delete from outbox.postmark": set(),
    "update outbox.postmark_watch set seen_at = since": set(),
    "select outbox.watch_postmarks(true)": {"worker"},
    "select outbox.forget_postmarks()": {"worker"},
    "create table outbox.mine (n int)": set(),
    "select * from outbox.base, outbox.horizon": {"app", "worker", "operator", "reader"},
    "delete from outbox.base": set(),
    "insert into outbox.base (target, key, id, payload, created_at) values ('index', 'k', 1, '{}', now())": set(),
    "update outbox.horizon set id = 5": set(),
    "select * from outbox.follower, outbox.archive, outbox.partition": {"worker", "operator", "reader"},
    "insert into outbox.follower (name, tick) values ('x', 1)": {"worker", "operator"},
    "delete from outbox.follower": {"worker", "operator"},
    "update outbox.archive set place = 'elsewhere'": {"worker", "operator"},
    "update outbox.archive set dropped_at = now()": set(),
    "delete from outbox.archive": set(),
    "drop table outbox.log_000000": set(),
    "select outbox.cut(1000000), (select count(*) from outbox.held(1000000, 1))": {"worker", "operator", "reader"},
    "select outbox.check_droppable(1000000)": set(),
    "select outbox.forget_dropped(), outbox.forget_sagas('1 day')": {"worker", "operator"},
    "select outbox.repeats('{}'), (select count(*) from outbox.word)": {"worker", "operator", "reader"},
    "insert into outbox.operation (kind) values ('replay')": {"worker", "operator"},
    "update outbox.operation set request = '{}'": set(),
    "delete from outbox.operation": set(),
    # Only the engine (outbox_saga) changes sagas: a participant's worker tells it what became of an intent.
    "select outbox.saga_report('', 0, 0, '{}', '{}', '{}')": {"worker"},
    "select outbox.saga_state('00000000-0000-0000-0000-000000000001')": {"app", "worker", "operator", "reader"},
    "select * from outbox.saga": {"worker", "operator", "reader"},
    "update outbox.saga set decision = 'commit'": set(),
    "delete from outbox.saga_step": set(),
    "insert into outbox.saga_void (id) values (1)": set(),
    "delete from outbox.saga_void": set(),
    "insert into outbox.saga_timer select * from outbox.saga_timer": set(),
    "delete from outbox.saga_event": set(),
}


@pytest.mark.parametrize("statement", RIGHTS)
def test_role_may_do_what_it_needs_and_nothing_else(admin: psycopg.Connection[Any], statement: str) -> None:
    admin.execute("create role outbox_test_nobody")
    try:
        allowed = set()
        for role in ("app", "worker", "operator", "reader", "test_nobody"):
            with admin.transaction(force_rollback=True):
                admin.execute(f"set local role outbox_{role}")
                try:
                    with admin.transaction():
                        admin.execute(statement)
                    allowed.add(role)
                except psycopg.errors.InsufficientPrivilege:
                    pass
        assert allowed == RIGHTS[statement]
    finally:
        admin.execute("drop role outbox_test_nobody")


def test_log_is_append_only_for_its_owner_too(admin: psycopg.Connection[Any]) -> None:
    admin.execute("select outbox.emit('index', 'put', 'k')")
    for statement in (
        "update outbox.log set key = 'x'",
        "delete from outbox.log",
        "truncate outbox.log",
        "delete from outbox.log_000000",
        "truncate outbox.log_000000",
    ):
        with pytest.raises(psycopg.Error, match="append-only") as caught:
            admin.execute(statement)
        assert caught.value.sqlstate == "OB001"


def test_functions_that_run_as_owner_fix_their_search_path(admin: psycopg.Connection[Any]) -> None:
    rows = admin.execute(
        "select proname, proconfig from pg_proc where pronamespace = 'outbox'::regnamespace and prosecdef"
    ).fetchall()
    assert len(rows) >= 4
    assert all(config and config[0].startswith("search_path=pg_catalog") for _, config in rows), rows


def test_limits_are_the_same_in_sql_and_in_python(admin: psycopg.Connection[Any]) -> None:
    query = (
        "select pg_get_constraintdef(oid) from pg_constraint where contype = 'c' and conrelid = 'outbox.log'::regclass"
    )
    checks = " ".join(row[0] for row in admin.execute(query))
    assert str(PAYLOAD_LIMIT) in checks
    assert str(KEY_LIMIT) in checks


def test_partitions_are_made_ahead_and_take_rows_at_their_borders(admin: psycopg.Connection[Any]) -> None:
    count = "select count(*) from pg_inherits where inhparent = 'outbox.log'::regclass"
    before = admin.execute(count).fetchone()
    assert admin.execute("select outbox.add_partitions()").fetchone() == (0,)
    admin.execute("select setval('outbox.log_id', 999998)")
    ids = [admin.execute("select outbox.emit('index', 'put', 'k')").fetchone() for _ in range(3)]
    assert ids == [(999_999,), (1_000_000,), (1_000_001,)]
    assert admin.execute("select outbox.add_partitions()").fetchone() == (1,)
    assert admin.execute(count).fetchone() == (before[0] + 1,)  # type: ignore[index]
    with pytest.raises(psycopg.Error, match="append-only"):
        admin.execute("truncate outbox.log_000016")


def test_slot_is_the_same_in_every_database(admin: psycopg.Connection[Any]) -> None:
    rows = admin.execute("select outbox.slot(k) from unnest(array['a', 'note/1', 'é']) k").fetchall()
    assert [row[0] for row in rows] == [3265, 5041, 9949]
