"""Queues of actors, and what becomes of the log that they are in: they stop, and go on, like all lanes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg

from outbox import adoption, era
from outbox.watermark import Watermark
from tests.fixtures.actors import Stage
from tests.fixtures.site import LIMIT, until
from workers.tenure import STOPPED_EVERY

STOPPED = "select min(reason) from outbox.lane where target = 'actor.default' and state = 'stopped'"


def end(worker: subprocess.Popen[bytes]) -> None:
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT) == 0


def adopt(stage: Stage, state: Path | None = None) -> adoption.Adopted:
    with psycopg.connect(stage.admin.info.dsn, autocommit=True) as conn:
        return adoption.adopt(conn, adoption.plan(conn, Watermark(state)))


def test_actor_i2_i3_queue_stops_when_the_log_can_not_go_on_and_goes_on_when_it_is_adopted(stage: Stage) -> None:
    # Given a queue that has done something, and has something to do; and a log that went back
    stage.company.note.send("done")
    worker = stage.start()
    stage.drained()
    end(worker)
    stage.company.note.send("open")
    era.halt(stage.admin, "for the test")
    # When a worker comes, then it doesn't begin, and says why
    stage.start()
    assert "for the test" in until(lambda: stage.one(STOPPED), "the queue is stopped")
    assert stage.runs("open") == 0
    # When it is adopted, then nothing of it is in doubt, as was said before
    with psycopg.connect(stage.admin.info.dsn, autocommit=True) as conn:
        planned = {one.target: one for one in adoption.plan(conn, Watermark(None)).participants}["actor.default"]
    assert (planned.not_done, planned.in_doubt) == (1, 0)
    adopted = adopt(stage)
    assert (adopted.not_done, adopted.in_doubt) == (1, 0)
    # And the same worker goes on, with what was before and with what comes
    stage.company.note.send("new")
    until(lambda: stage.runs("new"), "the queue goes on in the next era")
    stage.drained()
    assert [stage.runs(name) for name in ("done", "open", "new")] == [1, 1, 1]
    assert stage.parked() == []


def test_actor_i3_queue_stops_when_its_state_directory_is_a_copy(stage: Stage, tmp_path: Path) -> None:
    # Given a state directory in which the workers of a queue have noted how far they are, and a copy of it
    stage.company.note.send("done")
    worker = stage.start()
    stage.drained()
    until(lambda: list(stage.state.glob("watermark/*actor.default*")), "it is noted")
    end(worker)
    copy = tmp_path / "copy"
    shutil.copytree(stage.state, copy)
    stage.company.note.send("open")
    # When a worker comes with the copy, then it doesn't begin
    worker = stage.start(OUTBOX_STATE=str(copy))
    assert "this state directory is a copy" in until(lambda: stage.one(STOPPED), "the queue is stopped")
    assert stage.runs("open") == 0
    end(worker)
    # ... and one with the original goes on
    stage.start()
    until(lambda: stage.runs("open"), "the original goes on")
    stage.drained()


def test_actor_i3_queue_halts_all_when_the_log_went_back(stage: Stage) -> None:
    # Given a queue that has noted a tick, which the log doesn't have any more, as after a snapshot of its machine
    stage.company.note.send("done")
    worker = stage.start()
    stage.drained()
    until(lambda: list(stage.state.glob("watermark/*actor.default*")), "it is noted")
    end(worker)
    stage.admin.execute("update outbox.tick set nonce = 'ffffffffffffffff'")
    # When a worker comes, then it stops, and nobody goes on: no clock, and no lane of others
    stage.company.note.send("open")
    stage.start()
    assert "was seen" in until(lambda: stage.one(STOPPED), "the queue is stopped")
    assert "was seen" in until(lambda: stage.one("select halted from outbox.era"), "the era is halted")
    assert stage.runs("open") == 0


def test_actor_queue_that_can_not_go_on_is_looked_at_now_and_then(stage: Stage) -> None:
    # Given a queue whose worker finds that the log can't go on
    stage.company.note.send("open")
    era.halt(stage.admin, "for the test")
    stage.start(OUTBOX_TTL="120")
    until(lambda: stage.one(STOPPED), "the queue is stopped")
    # When the worker has looked after its share of lanes some times more
    began, epochs = time.monotonic(), "select avg(epoch)::float8 from outbox.lane where target = 'actor.default'"
    before = stage.one(epochs)
    looks = set[object]()

    def looked() -> bool:
        looks.add(stage.one("select max(lease_until) from outbox.consumer"))
        return len(looks) > 6

    until(looked, "looks at the shares")
    # Then it has not claimed the lanes each time
    assert stage.one(epochs) - before <= 1 + (time.monotonic() - began) / STOPPED_EVERY
