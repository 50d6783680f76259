"""Scrub beside traffic, after a kill, with a rate, and through a participant of one's own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from outbox import operation
from outbox.database import connect
from outbox.intent import Intent
from outbox.participant import Item, Participant
from outbox.settings import Settings
from tests.fixtures.scrub import Yard, kinds
from tests.fixtures.site import Site, until
from workers.scrub import schedule, survey
from workers.scrub.blob import BlobSubject
from workers.scrub.index import IndexSubject
from workers.scrub.own import OwnSubject
from workers.scrub.pace import Pace, Rate
from workers.scrub.spill import Spill
from workers.scrub.subject import Fault, Held, Subject
from workers.scrub.survey import Survey

# ------------------------------------------------------------------------------------------ never a false alarm


class _Interrupted:
    """A subject in whose methods the world goes on: `between` maps a method to what happens as it begins or ends."""

    def __init__(self, subject: Subject, **between: Callable[[], Any]) -> None:
        self._subject, self._between = subject, between
        self.target, self.advice, self.stray_advice = subject.target, subject.advice, subject.stray_advice

    def _now(self, name: str) -> None:
        self._between.pop(name, lambda: None)()

    def held(self) -> Iterator[Held]:
        self._now("before_held")
        yield from self._subject.held()
        self._now("after_held")

    def look(self, seen: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        self._now("before_look")
        found = self._subject.look(seen)
        self._now("after_look")
        return found

    def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
        self._now("before_fault")
        return self._subject.fault(intent, held, pace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


@pytest.mark.parametrize("when", ["before_held", "after_held", "before_fault", "before_look", "after_look"])
@pytest.mark.parametrize("damage", [False, True], ids=["well", "damaged"])
def test_scrub_i4_accuses_nobody_when_the_world_goes_on_in_the_middle(yard: Yard, when: str, damage: bool) -> None:
    # Given documents, of which two are damaged so that there is something to look at again
    for n in range(6):
        yard.put(f"note/{n}", "as it was")
    yard.drain()
    if damage:
        db = yard.writable()
        db.delete_document("Qnote/4")
        db.delete_document("Qnote/5")
        db.commit()
        db.close()

    def world() -> None:
        # Put anew, changed, deleted, and put after it was deleted, in more commits than a reader of Xapian survives
        yard.put("note/new")
        yard.put("note/0", "changed")
        yard.drain()
        yard.delete("index", "note/1")
        yard.delete("index", "note/2")
        yard.drain()
        yard.put("note/2", "and back")
        # ... which also puts one of the damaged ones anew
        yard.put("note/4", "anew")
        yard.drain()

    # When all of that is committed and applied at the worst time
    subject = _Interrupted(IndexSubject(yard.index), **{when: world})
    ours = operation.begin(yard.operator, "scrub", {})
    progress = Survey(yard.operator, ours, subject).run()
    # Then only the damage is found that nobody has touched since
    assert kinds(progress) == ([("missing", "note/5")] if damage else [])
    if when == "before_held":
        assert progress.moving > 0


@pytest.mark.parametrize("when", ["before_held", "after_held", "before_look", "after_look"])
def test_scrub_i2_accuses_nobody_when_what_was_parked_is_applied_in_the_middle(yard: Yard, when: str) -> None:
    # Given an intent that is parked, with its effect not made
    yard.put("note/1", "old")
    yard.drain()
    number = yard.put("note/1", "new")
    yard.admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason, retry_at) values "
        "(%s, 'index', outbox.slot('note/1'), 'note/1', 'retry', now() + interval '1 day')",
        (number,),
    )
    yard.bench.clock.step()

    def applied() -> None:
        yard.admin.execute("delete from outbox.parked")
        yard.admin.execute("delete from outbox.position where target = 'index'")
        yard.drain()

    # The lane has passed it
    yard.admin.execute(
        "insert into outbox.position (target, lane, epoch, tick) select 'index', 0, epoch, (select max(id) from "
        "outbox.tick) from outbox.lane where target = 'index'"
    )
    assert yard.found("index") == []
    subject = _Interrupted(IndexSubject(yard.index), **{when: applied})
    progress = Survey(yard.operator, operation.begin(yard.operator, "scrub", {}), subject).run()
    assert kinds(progress) == []


@pytest.mark.parametrize("when", ["before_held", "after_held", "before_fault", "before_look", "after_look"])
def test_scrub_i2_accuses_nobody_when_what_is_parked_has_been_applied_already(yard: Yard, when: str) -> None:
    # Given an intent whose effect is made, by a worker that has yet to write down that it is parked no more
    yard.put("note/1", "old")
    yard.drain()
    number = yard.put("note/1", "new")
    yard.drain()
    yard.admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason, retry_at) values "
        "(%s, 'index', outbox.slot('note/1'), 'note/1', 'retry', now() + interval '1 day')",
        (number,),
    )
    progress = yard.survey("index")
    assert (progress.findings, progress.moving) == ([], 1)
    # When it writes that at any time
    subject = _Interrupted(
        IndexSubject(yard.index),
        **{when: lambda: yard.admin.execute("delete from outbox.parked")},
    )
    progress = Survey(yard.operator, operation.begin(yard.operator, "scrub", {}), subject).run()
    assert kinds(progress) == []


def test_scrub_i4_finds_nothing_when_workers_and_applications_are_busy(
    yard: Yard, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given real workers, and an application that puts, changes and deletes documents and blobs
    yard.bench.conn.close()
    yard.admin.execute("update outbox.lane set owner = null, place = null, lease_until = null")
    yard.store = BlobSubject(yard.store)._store
    for target in ("clock", "index", "blob"):
        site.start(target)
    stop = threading.Event()
    written: list[str] = []

    def traffic() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            yard.put(f"note/{n % 40}", f"words {n}")
            written.append(yard.blob(b"%d" % (n % 30)))
            if n % 3 == 0:
                yard.delete("index", f"note/{n % 39}")
                yard.delete("blob", written[-2])

    writer = threading.Thread(target=traffic)
    writer.start()
    try:
        # When it is scrubbed again and again meanwhile, with pauses in the most awkward places
        until(lambda: site.documents() and next(yard.store.inventory(), None), "the workers work")
        moving = {"index": 0, "blob": 0}

        def scrubbed() -> bool:
            for target in moving:
                progress = yard.survey(target, rate=Rate(200, "items"))
                # Then nothing is ever found
                assert progress.findings == [], target
                moving[target] += progress.moving
            return all(moving.values())

        until(scrubbed, "something was in motion while it was looked at")
    finally:
        stop.set()
        writer.join()
    # And nothing either when all is quiet
    until(lambda: yard.survey("index").moving == 0 and yard.survey("blob").moving == 0, "the workers have applied all")
    assert yard.found("index") == yard.found("blob") == []


# ----------------------------------------------------------------------------------------------- a participant's


class Shelf(Participant):
    """A participant of one's own: a folder of JSON files."""

    root = Path()

    def apply(self, batch: Any, position: Any) -> Any:
        raise NotImplementedError

    def digest(self, intent: Intent) -> str:
        return str(intent.payload)

    def inventory(self) -> Iterator[Item]:
        for path in self.root.iterdir():
            held = json.loads(path.read_text())
            yield Item(path.name, str(held["payload"]), held["id"])


def test_scrub_compares_a_participant_of_ones_own_by_its_own_digest(yard: Yard, tmp_path: Path) -> None:
    # Given a participant that holds one thing rightly, an older one, a wrong one and a foreign one
    root = Shelf.root = tmp_path / "shelf"
    root.mkdir()
    ids = {key: yard._emit("sink", "put", key, n) for n, key in enumerate(["a", "b", "c", "d"])}
    newer = yard._emit("sink", "put", "b", 7)
    yard.bench.drain(yard.bench.reader())
    for key, number, payload in [("a", ids["a"], 0), ("b", ids["b"], 1), ("c", ids["c"], 9), ("x", 99, 0)]:
        (root / key).write_text(json.dumps({"id": number, "payload": payload}))
    ours = operation.begin(yard.operator, "scrub", {})
    progress = Survey(yard.operator, ours, OwnSubject("sink", Shelf)).run()
    assert kinds(progress) == [("stale", "b"), ("corrupt", "c"), ("missing", "d"), ("orphaned", "x")]
    assert [each.id for each in progress.findings] == [newer, ids["c"], ids["d"], 99]


# ------------------------------------------------------------------------------------- resumed, bounded, polite


def test_scrub_goes_on_where_it_was_when_it_was_killed_in_the_middle(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a scrub that saves after each key, and dies in the middle with one finding behind it
    monkeypatch.setattr(survey, "SAVE_EVERY", 0.0)
    for n in range(10):
        yard.put(f"note/{n}")
    yard.drain()
    db = yard.writable()
    db.delete_document("Qnote/2")
    db.delete_document("Qnote/8")
    db.commit()
    db.close()
    monkeypatch.setattr(survey, "SUSPICIONS", 1)
    seen: list[str] = []

    class Killed(Exception):
        pass

    class Counting(IndexSubject):
        def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
            if len(seen) == 6:
                raise Killed
            seen.append(intent.key)
            return super().fault(intent, held, pace)

    ours = operation.begin(yard.operator, "scrub", {"target": "index"})
    subject = Counting(yard.index)
    with pytest.raises(Killed):
        Survey(yard.operator, ours, subject).run()
    ours.end(yard.operator, "running")
    # When another process takes it up
    again = operation.resume(yard.operator, ours.id)
    progress = Survey(yard.operator, again, yard.subject("index")).run()
    # Then it looked at the rest only, and has what both found
    assert again.epoch == ours.epoch + 1
    assert kinds(progress) == [("missing", "note/2"), ("missing", "note/8")]
    assert progress.items == 10
    assert "note/0" in seen


def test_scrub_comes_by_its_schedule_once_in_each_interval_and_goes_on_after_a_kill(
    yard: Yard, worker_url: str
) -> None:
    yard.put("note/1")
    yard.drain()
    settings = Settings(worker_url, yard.index, None, "", scrub_every=3600.0)
    stop = threading.Event()

    def done() -> list[int]:
        rows = yard.admin.execute("select id from outbox.operation where kind = 'scrub' and state = 'done' order by id")
        return [row[0] for row in rows]

    with connect(worker_url, name="scrub") as conn:
        # Given a scrub that its process did not live to end, it goes on with that one
        request = {"target": "index", "repair": False, "every": 3600.0}
        left = operation.begin(conn, "scrub", request)
        left.end(conn, "running")
        schedule.if_due(settings, conn, "index", stop)
        assert done() == [left.id]
        # Then none comes before its time
        schedule.if_due(settings, conn, "index", stop)
        assert done() == [left.id]
        # ... and one does when it is time, but not while another process is at it
        later = datetime.now(UTC) + timedelta(hours=2)
        conn.execute("select set_config('outbox.fake_now', %s, false)", (later.isoformat(),))
        busy = operation.begin(conn, "scrub", request)
        schedule.if_due(settings, conn, "index", stop)
        assert done() == [left.id]
        busy.end(conn, "abandoned")
        schedule.if_due(settings, conn, "index", stop)
        assert len(done()) == 2
        # When it is told to stop, it lets go, and the next one takes it up
        stop.set()
        conn.execute("select set_config('outbox.fake_now', %s, false)", ((later + timedelta(hours=2)).isoformat(),))
        schedule.if_due(settings, conn, "index", stop)
        assert len(done()) == 2
        stop.clear()
        schedule.if_due(settings, conn, "index", stop)
        assert len(done()) == 3


def test_scrub_keeps_to_its_rate_and_calls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a clock that only sleeping moves
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    beats: list[float] = []
    pace = Pace(Rate(1000, "bytes"), lambda: beats.append(now[0]))
    pace.resume(7, 700)
    for _ in range(50):
        pace.spend(1, 100)
    assert now[0] == pytest.approx(105.0)
    assert len(beats) == 6


def test_scrub_sorts_more_than_it_holds_in_memory() -> None:
    keys = [f"{n * 7919 % 1000:03}" for n in range(1000)]
    with Spill(((key, "ä", None) for key in keys), run=64) as spill:
        assert [row[0] for row in spill] == sorted(keys)
        assert spill.count == 1000
        assert next(iter(spill)) == ["000", "ä", None]
