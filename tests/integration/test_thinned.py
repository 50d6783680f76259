"""Lanes whose owner wrote nothing for longer than ticks are kept: it was waiting for its participant, or suspended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from outbox import sql
from outbox.errors import Unavailable
from outbox.settings import Settings
from tests.fixtures.lanes import TARGET, Bench, Sink
from tests.fixtures.site import LIMIT, until
from workers import reader as readers
from workers.clock import TICK_AGE
from workers.process import Drainer


class Counted(Sink):
    """A sink that counts how often its lane is looked at."""

    looks = 0

    def wake(self) -> bool:
        self.looks += 1
        return False


@pytest.fixture
def later(bench: Bench) -> Callable[[], None]:
    """Lets two hours go by, with some traffic at their end, and has the ticks thinned."""

    def go_by() -> None:
        bench.admin.execute("update outbox.tick set at = at - interval '2 hours'")
        for _ in range(2):
            elsewhere(bench)
        bench.conn.execute(sql.load("tick_thin"), {"age": TICK_AGE})

    return go_by


def elsewhere(bench: Bench) -> int:
    """An intent of another participant. → the tick that shows it."""
    bench.admin.execute("select outbox.emit('index', 'put', 'k')")
    assert bench.clock.step()
    return bench.clock.position.tick


def position(bench: Bench) -> int | None:
    """The tick of the lane's position, as it is written down."""
    row = bench.admin.execute(
        "select tick from outbox.position where target = %s order by seq desc limit 1", (TARGET,)
    ).fetchone()
    return None if row is None else int(row[0])


def test_reader_i10_writes_its_position_down_before_it_waits_for_its_participant(
    bench: Bench, worker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Callable[[], None]
) -> None:
    # Given a lane that has gone on over ticks with nothing for it, which it writes down now and then only
    monkeypatch.setattr(readers, "EMPTY_EVERY", 10.0**9)
    sink, stop = Counted(), threading.Event()
    settings = Settings(worker_url, tmp_path / "index", tmp_path / "blobs", "smtp://127.0.0.1:1", ttl=3600.0)
    thread = threading.Thread(target=Drainer(settings, TARGET, 0, lambda: sink, stop, lanes=1).run)
    thread.start()
    try:
        until(lambda: sink.looks, "it drains")
        tick = elsewhere(bench)
        seen = sink.looks
        until(lambda: sink.looks > seen + 2, "it has looked")
        # When its participant is down, and stays so for longer than ticks are kept
        sink.fate["a"] = Unavailable("it is down")
        bench.emit("a")
        bench.clock.step()
        until(lambda: position(bench) == tick, "it has written down where it waits")
        later()
        # Then where it stands is still in the log
        assert bench.admin.execute("select count(*) from outbox.tick where id = %s", (tick,)).fetchone() == (1,)
    finally:
        stop.set()
        thread.join(LIMIT)
    assert not thread.is_alive()


def test_lane_i2_goes_on_from_the_tick_before_when_the_one_that_it_stands_at_was_thinned(
    bench: Bench, later: Callable[[], None]
) -> None:
    # Given an owner that stood at a tick that it had not written down, and was suspended until that was thinned
    reader = bench.reader()
    bench.emit("before")
    bench.drain(reader)
    reader._written_at = float("inf")
    for _ in range(3):
        elsewhere(bench)
        while reader.step():
            pass
    thinned = reader.position.tick
    assert position(bench) != thinned
    wanted = [f"k{n:03}" for n in range(Sink.batch_limit + 50)]
    for key in wanted:
        bench.emit(key)
    bench.clock.step()
    later()
    assert bench.admin.execute("select count(*) from outbox.tick where id = %s", (thinned,)).fetchone() == (0,)
    # When it goes on, and dies in the middle of a batch
    reader.step()
    assert position(bench) == thinned
    bench.die()
    # Then the next owner finds a place to go on from, and nothing is left out
    bench.drain(bench.reader())
    done = [key for key, _ in bench.sink.effects]
    assert done[0] == "before"
    assert list(dict.fromkeys(done[1:])) in (wanted, ["before", *wanted])
