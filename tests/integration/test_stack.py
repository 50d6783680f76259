"""The embedded stack as its user meets it: up, down, and every way to be interrupted between them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from outbox.errors import NotReady, StateVersion
from outbox.settings import Settings
from tests.fixtures.site import LIMIT
from workers import orphan, supervisor
from workers.postgres import Postgres
from workers.stack import Stack
from workers.statedir import StateDirectory, until
from workers.supervisor import SERVERS, Unanswered

pytestmark = pytest.mark.slow

#: What runs where no actors are configured.
WORKERS = tuple(name for name in supervisor.WORKERS if name not in ("actors", "relay"))

UP = [sys.executable, "-P", "-m", "outbox", "up", "--state"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A short path (sockets) that Postgres's user may pass through."""
    path = Path(tempfile.mkdtemp(prefix="ob-"))
    path.chmod(0o755)
    yield path
    for state in path.iterdir():
        with suppress(NotReady):
            Stack(state).down()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def stack(home: Path) -> Stack:
    """The stack of the module, running."""
    stack = Stack(home / "state")
    stack.up()
    return stack


def supervisord(stack: Stack) -> int:
    return int((stack.state / "supervisord.pid").read_text(encoding="ascii"))


def left(stack: Stack) -> bool:
    return bool(orphan.orphans(stack.state)) or stack.postgres.pid() is not None


def settings(stack: Stack) -> Settings:
    return Settings.load(stack.state, env={})


def at_work(stack: Stack) -> None:
    """Wait until each worker owns its lane: one that runs may still be importing, and one that was killed before
    may be in the lane's row."""

    def owned() -> bool:
        pids = stack.pids()
        query = "select bool_and(split_part(place, '/', 4) = %s) from outbox.lane where target = %s"
        return all(conn.execute(query, (str(pids.get(name)), name)).fetchone() == (True,) for name in WORKERS)

    with psycopg.connect(stack.postgres.url(database="app"), autocommit=True) as conn:
        assert until(owned, LIMIT)


def test_up_runs_everything_and_says_so_again(stack: Stack) -> None:
    programs = stack.info().programs
    assert set(programs) == {*SERVERS, *WORKERS}
    assert {state.name for state in programs.values()} == {"RUNNING"}
    assert stack.up() is False
    with psycopg.connect(settings(stack).database) as conn:
        assert conn.execute("select outbox.emit('index', 'put', 'k', '{}')").fetchone()
    at_work(stack)


def test_up_runs_the_sagas_and_actors_of_the_directory_it_is_called_in(home: Path) -> None:
    # Given a directory with an application's module
    directory = home / "application"
    directory.mkdir()
    (directory / "hello.py").write_text(_HELLO, encoding="utf-8")
    environment = {**os.environ, "OUTBOX_ACTORS": "hello", "OUTBOX_SAGAS": "hello"}
    state = home / "of-application"

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=directory, env=environment | {"OUTBOX_STATE": str(state)}, text=True, check=True, timeout=LIMIT,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.stdout

    run(*UP, str(state))
    try:
        # When it sends, then its actor runs, and its saga comes to its end
        assert run(sys.executable, "hello.py").split() == ["7", "completed"]
    finally:
        Stack(state).down()


_HELLO = f"""
import time

import dramatiq
from dramatiq.results import Results
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from outbox import Outbox, Saga, Settings
from outbox.actor import OutboxBroker, OutboxResults

settings = Settings.load()
Session = sessionmaker(create_engine(settings.sqlalchemy_url))
broker = OutboxBroker(Outbox(Session, settings))
broker.add_middleware(Results(backend=OutboxResults(broker)))
dramatiq.set_broker(broker)
greeting = Saga("greeting", dict)


@greeting.function(kind="pivot")
def greet(session, run):
    return {{}}


@dramatiq.actor(store_results=True)
def count(word):
    return len(word)


if __name__ == "__main__":
    with Session.begin() as session:
        sent = count.send("letters")
        saga = greeting.start(session, {{}})
    print(sent.get_result(block=True, timeout={LIMIT * 1000}))
    deadline = time.monotonic() + {LIMIT}
    while (state := greeting.state(session, saga)) != "completed" and time.monotonic() < deadline:
        session.rollback()
        time.sleep(0.05)
    print(state)
"""


def test_state_is_private(stack: Stack) -> None:
    everybody = 0o001 if os.geteuid() == 0 else 0  # root's Postgres passes through as a user of its own
    assert stack.state.stat().st_mode & 0o077 == everybody
    for entry in stack.state.iterdir():
        if entry.is_dir():
            assert entry.stat().st_mode & 0o077 == 0, entry
    assert (stack.sockets / "ctl.sock").stat().st_mode & 0o077 == 0


def test_killed_worker_comes_back(stack: Stack) -> None:
    before = stack.pids()["clock"]
    stack.kill("clock")
    assert until(lambda: stack.pids().get("clock") not in (None, before), LIMIT)


def test_crashed_postgres_comes_back_with_what_was_committed(stack: Stack) -> None:
    with psycopg.connect(settings(stack).database) as conn:
        conn.execute("create table if not exists kept (n int)")
        conn.execute("insert into kept values (1)")
    before = stack.pids()["postgres"]
    stack.restart_postgres_immediately()
    assert stack.pids()["postgres"] != before
    with psycopg.connect(settings(stack).database) as conn:
        assert conn.execute("select count(*) >= 1 from kept").fetchone() == (True,)
    # The workers survive it, or are started again.
    assert until(lambda: set(stack.pids()) == {*SERVERS, *WORKERS}, LIMIT)


def test_down_leaves_nothing_and_up_finds_its_data(stack: Stack) -> None:
    with psycopg.connect(settings(stack).database) as conn:
        conn.execute("create table if not exists kept2 (n int)")
    assert stack.down() is True
    assert not left(stack)
    assert stack.pids() == {}
    assert stack.down() is False
    assert stack.up() is True
    with psycopg.connect(settings(stack).database) as conn:
        assert conn.execute("select count(*) from kept2").fetchone() == (0,)


def test_workers_drain_on_down(stack: Stack) -> None:
    at_work(stack)
    stack.down()
    log = (stack.state / "log" / "supervisord.log").read_text(encoding="utf-8")
    last = log[log.rindex("supervisord started") :]
    for name in WORKERS:
        assert f"stopped: {name} (exit status 0)" in last
    # Postgres goes last: the others use it.
    assert last.index("stopped: postgres") > max(last.index(f"stopped: {name}") for name in (*WORKERS, "mailserver"))


@pytest.mark.parametrize("then", ["up", "down"])
def test_killed_supervisord(stack: Stack, then: str) -> None:
    before = stack.pids()
    os.kill(supervisord(stack), signal.SIGKILL)
    assert until(lambda: stack.supervisor.phase() == "gone", LIMIT)
    assert stack.postgres.pid() == before["postgres"]
    if then == "up":
        assert stack.up() is True
        assert set(stack.pids().values()).isdisjoint(before.values())
        assert set(stack.pids()) == set(before)
    else:
        assert stack.down() is True
        assert not left(stack)


def test_lost_socket(stack: Stack) -> None:
    """A cleaner of temporary files took the socket away: the supervisord behind it is found and ended."""
    (stack.sockets / "ctl.sock").unlink()
    before = supervisord(stack)
    assert stack.up() is True
    assert supervisord(stack) != before
    assert len([pid for pid in orphan.orphans(stack.state) if pid == before]) == 0


def test_two_at_once(home: Path) -> None:
    state = home / "two"
    both = [subprocess.Popen([*UP, state], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=90)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0]
    first = sorted(text.splitlines()[0] for text in said)
    assert first == [f"outbox is already up in {state}", f"outbox is up in {state}"]
    assert Stack(state).down() is True


@pytest.mark.parametrize("reached", ["state.json", "pg/PG_VERSION", "supervisord.pid"])
def test_killed_up(home: Path, reached: str) -> None:
    """What `up` had made when it was killed is no hindrance to the next one."""
    stack = Stack(home / f"killed-{len(reached)}")
    child = subprocess.Popen([*UP, stack.state], stdout=subprocess.DEVNULL)
    assert until((stack.state / reached).exists, LIMIT)
    child.kill()
    child.wait()
    assert stack.up() is True
    assert set(stack.pids()) == {*SERVERS, *WORKERS}
    stack.down()
    assert not left(stack)


def test_database_of_the_shell_is_not_the_stacks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that `up` prints for applications must not turn the workers to another database, as another user."""
    monkeypatch.setenv("OUTBOX_DATABASE", "postgresql://app@/elsewhere")
    monkeypatch.setenv("OUTBOX_SAGA_DATABASE", "postgresql://saga@/elsewhere")
    monkeypatch.setenv("OUTBOX_INDEX", "relative")
    environment = Stack(home / "none")._environment()
    assert not {"OUTBOX_DATABASE", "OUTBOX_SAGA_DATABASE"} & environment.keys()
    assert environment["OUTBOX_INDEX"] == str(Path.cwd() / "relative")


def test_other_format_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": 99}), encoding="utf-8")
    before = tmp_path.stat().st_mode, sorted(tmp_path.iterdir())
    for verb in (Stack(tmp_path).up, Stack(tmp_path).down):
        with pytest.raises(StateVersion, match="99"):
            verb()
    assert (tmp_path.stat().st_mode, sorted(tmp_path.iterdir())) == before


def test_path_that_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotReady, match="is a file"):
        Stack(file).up()
    with pytest.raises(NotReady, match="can't be used"):
        Stack(file / "below").up()


def test_directory_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    mode = tmp_path.stat().st_mode
    with pytest.raises(NotReady, match="other files"):
        Stack(tmp_path).up()
    assert tmp_path.stat().st_mode == mode
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_down_where_nothing_is(tmp_path: Path) -> None:
    assert Stack(tmp_path / "nothing").down() is False
    assert not (tmp_path / "nothing").exists()


def test_disk_full(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="is full"), StateDirectory(tmp_path).explained():
        raise OSError(errno.ENOSPC, "No space left on device", "x")


def test_disk_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=20 << 20))
    with pytest.raises(NotReady, match="20 MB free"):
        Stack(tmp_path / "s").up()


def test_socket_directory_of_somebody_else(tmp_path: Path) -> None:
    sockets = tmp_path / "run"
    sockets.mkdir(mode=0o777)
    sockets.chmod(0o777)
    with pytest.raises(NotReady, match="not private"):
        StateDirectory(tmp_path).fill(sockets, None)


def test_pid_of_a_stranger_is_not_postgres(tmp_path: Path) -> None:
    """After a power cut the pid in the file is any process's: nothing may be sent to it."""
    postgres = Postgres(tmp_path / "pg", tmp_path / "run")
    postgres.data.mkdir()
    (postgres.data / "postmaster.pid").write_text(f"{os.getpid()}\n", encoding="ascii")
    assert postgres.pid() is None


def test_only_processes_of_the_stack_are_orphans(tmp_path: Path) -> None:
    """An application that runs with OUTBOX_STATE is not ours to end; what supervisord started is."""
    theirs = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "OUTBOX_STATE": str(tmp_path)})
    ours = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], orphan.MARK: str(tmp_path)})
    try:
        assert until(lambda: orphan.orphans(tmp_path) == [ours.pid], LIMIT)
        assert orphan.end(tmp_path) is True
        assert ours.wait(LIMIT) == -signal.SIGTERM
        assert orphan.end(tmp_path) is False
        assert theirs.poll() is None
    finally:
        for child in (ours, theirs):
            child.kill()
            child.wait()


def test_orphan_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"],
        env={"PATH": os.environ["PATH"], orphan.MARK: str(tmp_path)},
        start_new_session=True,
    )
    try:
        assert until(lambda: child.pid in orphan.orphans(tmp_path), LIMIT)
        assert orphan.end(tmp_path, patience=0.5) is True
        assert child.wait(LIMIT) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


def test_nobody_answers(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "s")
    assert stack.pids() == {}
    assert stack.info().running is False
    with pytest.raises(Unanswered, match="outbox up"):
        stack.kill("clock")
