"""Replay: which intents are meant, what is left out, and that nothing comes twice or overwrites something newer."""

from __future__ import annotations

import datetime as dt
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from outbox import archive, live, operation, repetition, tick
from outbox.archive import Archived
from outbox.database import connect
from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.replay import course, plan
from outbox.replay.choice import Choice
from outbox.replay.course import Course, Step
from tests.fixtures.lanes import TARGET, Bench, Sink, keep
from tests.fixtures.site import LIMIT
from tests.integration.test_reader import POISON

Conn = psycopg.Connection[Any]


class Stage:
    """The bench's participant, and an operator who replays it."""

    def __init__(self, bench: Bench, url: str) -> None:
        self.bench = bench
        self.conn = connect(url, name="test")
        self.stream = connect(url, name="test")

    def plan(self, **more: Any) -> dict[tuple[str, str], int]:
        """→ (action, what becomes of it) → how many."""
        self.bench.clock.step()
        choice = Choice(targets=(TARGET,), **more)
        made = plan.make(self.conn, choice, choice.resolve(self.conn))
        return {(line.action, line.fate): line.intents for line in made.lines}

    def begin(self, **more: Any) -> Course:
        self.bench.clock.step()
        choice = Choice(targets=(TARGET,), **more)
        begun = course.begin(self.conn, choice, choice.resolve(self.conn), 0)
        return Course(self.conn, self.stream, begun)

    def resume(self, number: int) -> Course:
        return Course(self.conn, self.stream, operation.resume(self.conn, number))

    def replay(self, **more: Any) -> dict[str, Any]:
        replay = self.begin(**more)
        for _ in replay.steps():
            pass
        return replay.end()

    def again(self) -> list[tuple[str, Any]]:
        """What was appended, in order."""
        return self.bench.admin.execute(
            "select key, payload from outbox.log where headers ? 'replay' order by id"
        ).fetchall()

    def close(self) -> None:
        self.conn.close()
        self.stream.close()


@pytest.fixture
def stage(bench: Bench, operator_url: str) -> Iterator[Stage]:
    made = Stage(bench, operator_url)
    try:
        yield made
    finally:
        made.close()


def emit(bench: Bench, action: str, key: str, payload: Any = 0, *, saga: uuid.UUID | None = None) -> int:
    row = bench.admin.execute(
        "insert into outbox.log (target, action, key, payload, saga) values (%s, %s, %s, %s, %s) returning id",
        (TARGET, action, key, json.dumps(payload), saga),
    ).fetchone()
    assert row is not None
    return int(row[0])


SAGA = uuid.UUID(int=7)


def history(bench: Bench) -> dict[str, Any]:
    """Something of everything. → moments and ticks in it."""
    for n in range(3):
        emit(bench, "put", f"note/{n}", n)
    emit(bench, "put", "photo/1", "old")
    bench.clock.step()
    middle = tick.latest(bench.conn)
    row = bench.admin.execute("select clock_timestamp()").fetchone()
    assert row is not None
    emit(bench, "put", "note/1", "new")
    emit(bench, "delete", "photo/1")
    emit(bench, "put", "saga", "of a saga", saga=SAGA)
    emit(bench, "touch", "note/2", "event")
    bench.clock.step()
    return {"tick": middle.id, "time": row[0]}


CHOICES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["note/0", "note/1", "note/2", "photo/1", "saga"]),
    ({"key": "note/1"}, ["note/1"]),
    ({"key_prefix": "note/"}, ["note/0", "note/1", "note/2"]),
    ({"saga": SAGA}, ["saga"]),
    ({"begin": "time"}, ["note/1", "photo/1", "saga"]),
    ({"end": "time"}, ["note/0", "note/2"]),
    ({"after_tick": "tick"}, ["note/1", "photo/1", "saga"]),
    ({"upto_tick": "tick"}, ["note/0", "note/2"]),
    ({"key_prefix": "note/", "begin": "time"}, ["note/1"]),
]


@pytest.mark.parametrize(("more", "keys"), CHOICES, ids=[str(list(more)) for more, _ in CHOICES])
def test_replay_repeats_the_last_words_that_were_chosen(
    stage: Stage, bench: Bench, more: dict[str, Any], keys: list[str]
) -> None:
    marks = history(bench)
    chosen = {name: marks[value] if value in ("time", "tick") else value for name, value in more.items()}
    counts = stage.plan(**chosen)
    result = stage.replay(**chosen)
    # Then what was promised is what was done, and of each key only what it is in the end
    assert [key for key, _ in stage.again()] == keys
    assert result == {"again": len(keys), "left_out": {}}
    assert sum(n for (_, fate), n in counts.items() if fate == "again") == len(keys)
    assert all(value != "old" for _, value in stage.again())
    # And again, the repetitions count as nothing of their own
    assert stage.plan(**chosen) == counts


def test_replay_plans_what_becomes_of_each_intent(stage: Stage, bench: Bench) -> None:
    history(bench)
    bench.sink.fate |= {"poison": POISON}
    emit(bench, "put", "poison", 0)
    emit(bench, "put", "poison", 1)
    emit(bench, "put", "before", 1)
    bench.drain(bench.reader())
    bench.sink.fate["before"] = POISON
    void = emit(bench, "put", "void", 0)
    bench.admin.execute("insert into outbox.saga_void (id) values (%s)", (void,))
    bench.emit("later", due="2999-01-01")
    emit(bench, "put", "before", 2)
    bench.die()
    bench.drain(bench.reader())
    assert stage.plan() == {
        ("put", "again"): 4,
        ("delete", "again"): 1,
        ("put", "superseded"): 2,
        ("touch", "event"): 1,
        ("put", "poison"): 2,
        ("put", "blocked"): 1,
        ("put", "behind"): 1,
        ("put", "recalled"): 1,
        ("put", "due"): 1,
    }
    # And that is what it does
    assert stage.replay() == {"again": 5, "left_out": {"behind": 1}}
    assert [key for key, _ in stage.again()] == ["note/0", "note/1", "note/2", "photo/1", "saga"]


def test_replay_repeats_events_in_order_when_it_is_asked_for(stage: Stage, bench: Bench) -> None:
    for n in range(3):
        emit(bench, "touch", "k", n)
    assert stage.replay(events=True) == {"again": 3, "left_out": {}}
    assert stage.replay(events=True) == {"again": 3, "left_out": {}}
    assert [value for _, value in stage.again()] == [0, 1, 2] * 2


@pytest.mark.parametrize("reason", ["poison", "skipped"])
def test_replay_repeats_what_was_set_aside_once_and_for_good(stage: Stage, bench: Bench, reason: Any) -> None:
    # Given: of three keys something is poison; of one there is something newer behind it
    bench.sink.fate |= {"a": POISON, "b": POISON, "c": POISON}
    numbers = [emit(bench, "put", key, key) for key in "abc"]
    reader = bench.reader()
    bench.drain(reader)
    emit(bench, "put", "c", "newer")
    bench.drain(reader)
    if reason == "skipped":
        stage.conn.execute("select outbox.decide('skip', %s)", (numbers,))
    bench.sink.fate.clear()
    assert stage.plan(parked=(reason,)) == {("put", "anew"): 2, ("put", "superseded"): 1}
    # When
    assert stage.replay(parked=(reason,))["again"] == 2
    reader.decided()
    bench.drain(reader)
    # Then they are applied, and the parked ones stay skipped
    assert ("a", "a") in bench.sink.effects
    assert ("b", "b") in bench.sink.effects
    assert ("c", "c") not in bench.sink.effects
    assert {row[0] for row in bench.admin.execute("select id from outbox.parked where reason = 'skipped'")} >= set(
        numbers[:2]
    )
    # And never again
    assert stage.replay(parked=("poison", "skipped"))["again"] == 0
    live_now = {i.key: i.payload for i in live.puts(bench.conn, TARGET, tick.latest(bench.conn))}
    assert live_now == {"a": "a", "b": "b"} | ({"c": "newer"} if reason == "skipped" else {})
    assert stage.plan()["put", "again"] == len(live_now)


def test_replay_leaves_out_what_is_written_while_it_runs(
    stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "CHUNK", 2)
    for key in "abcdef":
        emit(bench, "put", key, "old")
    replay = stage.begin()
    steps = replay.steps()
    next(steps)
    # When keys that come later are put, deleted and made anew
    emit(bench, "put", "c", "new")
    emit(bench, "delete", "f", "")
    emit(bench, "put", "z", "new")
    for _ in steps:
        pass
    assert replay.end() == {"again": 4, "left_out": {"superseded": 2}}
    assert [key for key, _ in stage.again()] == ["a", "b", "d", "e"]


def test_replay_i3_goes_on_where_it_was_left(stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given: every chunk is a reading of its own, and the process goes after each
    monkeypatch.setattr(course, "CHUNK", 1)
    monkeypatch.setattr(course, "LEG", 0.0)
    for key in "abc":
        emit(bench, "put", key, key)
        emit(bench, "touch", key, key)
    replay = stage.begin(events=True)
    number = replay._operation.id
    taken = 0
    while next(replay.steps(), None) is not None:
        taken += 1
        replay._operation.end(stage.conn, "running")
        replay = stage.resume(number)
    assert taken == 6
    assert replay.end()["again"] == 6
    assert [key for key, _ in stage.again()] == ["a", "b", "c", "a", "b", "c"]


def test_replay_does_not_run_ahead_of_the_lane(stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "CHUNK", 2)
    monkeypatch.setattr(course, "AHEAD", 4)
    for n in range(10):
        emit(bench, "put", f"{n}")
    reader = bench.reader()
    bench.drain(reader)
    steps = stage.begin().steps()
    first = [next(steps) for _ in range(6)]
    # Then it waits, however often it is asked, until the lane has come after it
    assert first == [Step(TARGET, 2)] * 2 + [Step(TARGET, waits=True)] * 4
    bench.drain(reader)
    assert next(step for step in steps if not step.waits) == Step(TARGET, 2)


def test_replay_keeps_its_operation_while_it_waits(stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a replay that waits for a lane that nobody drains
    emit(bench, "put", "k")
    bench.drain(bench.reader())
    monkeypatch.setattr(course, "KEEP_EVERY", 0.0)
    replay = stage.begin()
    assert list(replay.steps()) == [Step(TARGET, 1)]
    bench.admin.execute("update outbox.operation set lease_until = now()")
    # When, then: others see that somebody is at it
    waits = replay.applied()
    assert next(waits).waits
    [row] = operation.find(stage.conn, kind="replay")
    assert row["runs"]


def test_replay_holds_no_snapshot_for_long(stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given: time is always up after a chunk, and a chunk is one intent
    monkeypatch.setattr(course, "LEG", 0.0)
    monkeypatch.setattr(course, "CHUNK", 1)
    for n in range(4):
        emit(bench, "put", f"k{n}", n)
    bench.drain(bench.reader())
    replay = stage.begin()
    # When it goes on
    began = set()
    for _ in replay.steps():
        row = bench.admin.execute(
            "select xact_start from pg_stat_activity where pid = %s", (stage.stream.info.backend_pid,)
        ).fetchone()
        assert row is not None
        began.add(row[0])
    # Then each chunk was read in a transaction of its own, and nothing came twice
    assert len(began - {None}) == 4
    assert [key for key, _ in stage.again()] == ["k0", "k1", "k2", "k3"]


def test_replay_waits_until_it_is_applied(stage: Stage, bench: Bench) -> None:
    emit(bench, "put", "k")
    reader = bench.reader()
    replay = stage.begin()
    assert list(replay.steps()) == [Step(TARGET, 1)]
    waits = replay.applied()
    assert next(waits).waits
    bench.drain(reader)
    assert list(waits) == []


def archived(bench: Bench, place: Path, until: int) -> None:
    """Archive what the log has below an id."""
    log = bench.admin.execute("select log from outbox.identity").fetchone()
    assert log is not None
    rows = [
        Archived(Intent(number, TARGET, action, key, body, saga=saga), created_at, 1)
        for number, action, key, body, saga, created_at in bench.admin.execute(
            "select id, action, key, payload::text, saga, created_at from outbox.log where id < %s order by id",
            (until,),
        )
    ]
    archive.write(rows, place, log=log[0], first=1, until=until)


def test_replay_takes_from_an_archive_what_counts_still(stage: Stage, bench: Bench, tmp_path: Path) -> None:
    # Given: a part of the log that was archived and dropped, and a key that was changed since
    numbers = {key: emit(bench, "put", key, key) for key in ("same", "changed", "gone")}
    emit(bench, "delete", "gone")
    emit(bench, "touch", "same", "event")
    emit(bench, "put", "saga", "of a saga", saga=SAGA)
    horizon = emit(bench, "touch", "later") + 1
    reader = bench.reader()
    bench.drain(reader)
    archived(bench, tmp_path, horizon)
    keep(
        bench, horizon, {key: (numbers[key], key) for key in ("same", "changed")} | {"saga": (horizon - 2, "of a saga")}
    )
    emit(bench, "put", "changed", "new")
    bench.drain(reader)
    bench.sink.effects.clear()
    place = str(tmp_path)
    # When
    counts = stage.plan(archive=place, events=True)
    assert counts == {
        ("put", "again"): 2, ("put", "superseded"): 2, ("delete", "again"): 1, ("touch", "event"): 2,
    }  # fmt: skip
    assert stage.replay(archive=place, events=True) == {"again": 5, "left_out": {"superseded": 2}}
    bench.drain(reader)
    # Then what the archive has and nothing newer has replaced is said again
    assert sorted(key for key, _ in bench.sink.effects) == ["gone", "later", "saga", "same", "same"]
    assert ("same", "event") in bench.sink.effects
    live_now = {i.key: i.payload for i in live.puts(bench.conn, TARGET, tick.latest(bench.conn))}
    assert live_now == {"same": "same", "changed": "new", "saga": "of a saga"}
    # ... or what of it was chosen, and that goes on where it was left
    assert stage.replay(archive=place, saga=SAGA) == {"again": 1, "left_out": {}}
    replay = stage.begin(archive=place, key="same")
    next(replay.steps())
    assert next(replay.steps(), None) is None


def test_replay_uses_nothing_of_an_archive_that_was_damaged(stage: Stage, bench: Bench, tmp_path: Path) -> None:
    emit(bench, "touch", "k")
    archived(bench, tmp_path, 1000)
    [file] = tmp_path.iterdir()
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(archive.ArchiveDamaged):
        stage.replay(archive=str(tmp_path), events=True)
    assert stage.again() == []
    # ... nor of two that contradict each other
    file.rename(tmp_path / file.name.replace("-0000000000000000001-", "-0000000000000000002-"))
    archived(bench, tmp_path, 1000)
    with pytest.raises(NotReady, match="two histories"):
        stage.plan(archive=str(tmp_path))


@pytest.mark.parametrize("target", ["saga", "clock", "nobody", "actor.default"])
def test_replay_refuses_participants_that_are_not_repeated(stage: Stage, target: str) -> None:
    stage.bench.admin.execute("select outbox.register('actor.default')")
    with pytest.raises(NotReady, match=r"never repeated|no participant 'nobody' is registered: choose among .*sink"):
        Choice(targets=(target,)).participants(stage.conn)


def test_replay_never_sends_a_message_to_an_actor_again(stage: Stage, bench: Bench) -> None:
    # Given a queue of actors with a message
    bench.admin.execute("select outbox.register('actor.default')")
    bench.admin.execute("select outbox.emit('actor.default', 'send', 'm', '{}')")
    bench.clock.step()
    # When everything is replayed, events too, then it is not among what is repeated
    choice = Choice(events=True)
    assert "actor.default" not in choice.participants(stage.conn)
    # ... and the server refuses it from whoever asks
    begun = operation.begin(stage.conn, "replay", {})
    number = bench.admin.execute("select max(id) from outbox.log").fetchone()
    assert number is not None
    with pytest.raises(NotReady, match=r"'actor\.default' are not repeated"):
        repetition.append(stage.conn, begun, "actor.default", [repetition.Again(number[0], None)])


def test_replay_takes_the_nearest_ticks_when_one_was_thinned(stage: Stage, bench: Bench) -> None:
    # Given: a tick that somebody noted, and that was thinned since; ticks with an intent each around it
    marks = []
    for n in range(4):
        emit(bench, "put", f"k{n}", n)
        bench.clock.step()
        marks.append(tick.latest(bench.conn).id)
    bench.admin.execute("delete from outbox.tick where id in (%s, %s)", marks[1:3])
    # When, then: nothing after it is missed, nor anything up to it
    assert stage.replay(after_tick=marks[1]) == {"again": 3, "left_out": {}}
    assert [key for key, _ in stage.again()] == ["k1", "k2", "k3"]
    assert stage.plan(upto_tick=marks[1])["put", "again"] == 4
    assert stage.plan(upto_tick=marks[0])["put", "again"] == 1


def test_replay_says_what_to_choose_by_when_a_tick_or_a_time_can_not_be(stage: Stage, bench: Bench) -> None:
    history(bench)
    bench.clock.step()
    newest = tick.latest(bench.conn).id
    bench.admin.execute("update outbox.horizon set tick = %s", (newest - 1,))
    now = dt.datetime(2026, 11, 30, 12, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))
    for more, says in (
        ({"after_tick": newest + 1}, f"tick {newest + 1} was not taken yet, the newest is {newest}"),
        ({"after_tick": newest - 2}, "is older than the log goes back .*choose by time"),
        ({"upto_tick": newest - 2}, "is older than the log goes back .*choose by time"),
        ({"after_tick": newest, "upto_tick": newest - 1}, "nothing lies between"),
        ({"begin": now, "end": now.astimezone(dt.UTC)}, r"nothing is from 2026-11-30 12:00:00\+0530 on and before "),
        ({"begin": dt.timedelta(hours=1), "end": dt.timedelta(hours=2)}, "exchange the two"),
    ):
        with pytest.raises(NotReady, match=says):
            stage.plan(**more)


def test_replay_counts_a_span_back_from_when_it_began(stage: Stage, bench: Bench) -> None:
    # Given: something old, and something new
    emit(bench, "put", "old")
    bench.admin.execute("alter table outbox.log disable trigger log_append_only")
    bench.admin.execute("update outbox.log set created_at = now() - interval '3 h'")
    bench.admin.execute("alter table outbox.log enable trigger log_append_only")
    emit(bench, "put", "new")
    # When, then
    assert stage.plan(begin=dt.timedelta(hours=2))["put", "again"] == 1
    assert stage.plan(end=dt.timedelta(hours=2))["put", "again"] == 1
    # ... and one that is taken up hours later is about the same
    replay = stage.begin(begin=dt.timedelta(hours=4))
    with bench.admin.transaction():
        stage.conn.execute("select set_config('outbox.fake_now', (now() + interval '2 h')::text, false)")
    for _ in replay.steps():
        pass
    assert [key for key, _ in stage.again()] == ["new", "old"]


def test_replay_plans_only_what_was_set_aside_when_that_is_asked_for(stage: Stage, bench: Bench) -> None:
    # Given: something that was changed, and an event and a put that were set aside
    history(bench)
    bench.sink.fate |= {"event": POISON, "put": POISON}
    event, put = emit(bench, "touch", "event"), emit(bench, "put", "put")
    bench.drain(bench.reader())
    stage.conn.execute("select outbox.decide('skip', %s)", ([event, put],))
    # When, then: nothing is said of what was applied; and of the event, that it can't be repeated so
    assert stage.plan(parked=("poison",)) == {}
    assert stage.plan(parked=("skipped",), events=True) == {("put", "anew"): 1, ("touch", "once"): 1}
    assert stage.replay(parked=("skipped",), events=True) == {"again": 1, "left_out": {}}


def test_replay_choice_is_the_same_after_it_was_stored() -> None:
    choice = Choice(
        targets=("index",), key="k", saga=SAGA, begin=dt.datetime(2026, 1, 2, tzinfo=dt.UTC), after_tick=3,
        parked=("poison",), events=True,
    )  # fmt: skip
    assert Choice.read(json.loads(json.dumps(choice.request()))) == choice
    ago = Choice(begin=dt.timedelta(hours=2), end=dt.timedelta(minutes=1.5))
    assert Choice.read(json.loads(json.dumps(ago.request()))) == ago
    assert Choice().request() == {}


def test_replay_measures_how_fast_a_lane_is(stage: Stage, bench: Bench) -> None:
    for n in range(300):
        bench.emit(f"{n}", n)
    bench.drain(bench.reader())
    choice = Choice(targets=(TARGET,))
    made = plan.make(stage.conn, choice, choice.resolve(stage.conn))
    rate = made.rates[TARGET]
    assert rate is not None
    assert rate > 0
    assert made.seconds == pytest.approx(300 / rate)
    slow = plan.make(stage.conn, choice, choice.resolve(stage.conn), rate=1.0)
    assert slow.seconds == 300


class Traffic:
    """Writers and a drained lane, in threads; what goes wrong in them is raised in the end."""

    KEYS = tuple(f"{a}{b}" for a in "abcd" for b in range(8))

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.sink = Sink()
        self.stop = threading.Event()
        self._errors: list[BaseException] = []
        self._reader = bench.reader(sink=self.sink)
        work = [self._drain, *(partial(self._write, number) for number in range(2))]
        self._threads = [threading.Thread(target=self._guarded, args=(each,)) for each in work]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
            raise

    def _write(self, number: int) -> None:
        chance = random.Random(self.seed * 100 + number)
        with psycopg.connect(self.bench.admin.info.dsn) as conn:
            while not self.stop.is_set():
                # As an application's rows would see to it: who writes of a key holds its lock until the commit.
                for key in sorted(chance.sample(self.KEYS, chance.randint(1, 3))):
                    conn.execute("select pg_advisory_xact_lock(hashtext(%s))", (key,))
                    action = chance.choice(["put", "put", "delete"])
                    payload = json.dumps(chance.random() if action == "put" else None)
                    conn.execute(
                        "insert into outbox.log (target, action, key, payload) values (%s, %s, %s, %s)",
                        (TARGET, action, key, payload),
                    )
                    self.stop.wait(chance.random() / 100)
                conn.commit() if chance.random() < 0.8 else conn.rollback()
                self.stop.wait(chance.random() / 20)

    def _drain(self) -> None:
        while not self.stop.is_set():
            self.bench.clock.step()
            self._reader.step()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(LIMIT)
        assert not self._errors
        self.bench.drain(self._reader)

    def held(self) -> dict[str, Any]:
        """What the participant has of each key."""
        return {key: value for key, value in dict(self.sink.effects).items() if value is not None}


@pytest.mark.parametrize("seed", range(2))
def test_replay_i4_i8_ends_with_what_is_live_when_there_is_traffic(
    stage: Stage, bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Given: a replay that takes its time between the look at the log and its commit
    monkeypatch.setattr(course, "CHUNK", 5)
    chance, append = random.Random(seed), repetition.append

    def slowly(*args: Any, **more: Any) -> Any:
        found = append(*args, **more)
        traffic.stop.wait(chance.random() / 10)
        return found

    monkeypatch.setattr(repetition, "append", slowly)
    # When parts of the keys are repeated again and again while they are written
    deadline = time.monotonic() + LIMIT
    with Traffic(bench, seed) as traffic:
        while len(stage.again()) < 150 and time.monotonic() < deadline:
            choice = Choice(targets=(TARGET,), key_prefix=chance.choice(["", *"abcd"]) or None)
            replay = Course(stage.conn, stage.stream, course.begin(stage.conn, choice, choice.resolve(stage.conn), 0))
            for _ in replay.steps():
                pass
            replay.end()
    # Then the participant has what is live
    assert len(stage.again()) >= 150
    assert traffic.held() == {i.key: i.payload for i in live.puts(bench.conn, TARGET, tick.latest(bench.conn))}
