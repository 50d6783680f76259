"""Effects in two phases: what the reader records, and when, whatever the participant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from outbox.errors import Fenced, Unavailable
from outbox.intent import Intent
from outbox.participant import Outcome, Verdict
from outbox.position import Position
from tests.fixtures.lanes import Bench, Sink


class Shelf(Sink):
    """Prepares on a shelf, and remembers what was on record when it released."""

    records_attempts = True

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench
        self.shelf: list[str] = []
        self.released: list[str] = []
        #: What outbox.receipt said at the time of each release.
        self.recorded: list[dict[int, tuple[str, Any]]] = []
        self.down = False

    def apply(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
        outcomes = []
        for intent in batch:
            known = self.receipts.get(intent.id) or {}
            fate = self.fate.get(intent.key)
            if not known:
                self.shelf.append(intent.key)
            if isinstance(fate, Outcome):
                outcomes.append(fate)
            else:
                outcomes.append(Outcome(Verdict.APPLIED, {"shelf": intent.key}, prepared=True))
        return outcomes

    def release(self, prepared: Sequence[tuple[Intent, dict[str, Any]]]) -> None:
        rows = self._bench.admin.execute("select id, state, evidence from outbox.receipt")
        self.recorded.append({row[0]: (row[1], row[2]) for row in rows})
        if self.down:
            raise Unavailable("the shelf is locked: open it")
        self.released += [receipt["shelf"] for _, receipt in prepared]


def states(bench: Bench) -> dict[int, str]:
    return dict(bench.admin.execute("select id, state from outbox.receipt order by id").fetchall())


def test_twophase_i3_records_all_that_is_prepared_before_it_is_released(bench: Bench) -> None:
    # Given: three intents, of which one fails
    shelf = Shelf(bench)
    shelf.fate["b"] = Outcome(Verdict.RETRY, {"half": 1}, "later")
    a, b, c = bench.emit("a"), bench.emit("b"), bench.emit("c")
    # When
    bench.drain(bench.reader(sink=shelf, backoff=None))
    # Then: at the time of the release all was on record, for another connection to see
    assert shelf.recorded[0] == {
        a: ("prepared", {"shelf": "a"}), b: ("partial", {"half": 1}), c: ("prepared", {"shelf": "c"})
    }  # fmt: skip
    assert shelf.released == ["a", "c"]
    assert states(bench) == {a: "closed", b: "partial", c: "closed"}


def test_twophase_i10_counts_nothing_and_prepares_nothing_again_when_the_release_is_refused(bench: Bench) -> None:
    # Given
    shelf = Shelf(bench)
    shelf.down = True
    a, b = bench.emit("a"), bench.emit("b")
    reader = bench.reader(sink=shelf)
    for _ in range(3):
        with pytest.raises(Unavailable):
            bench.drain(reader)
    assert states(bench) == {a: "prepared", b: "prepared"}
    assert bench.parked() == {}
    # When
    shelf.down = False
    bench.drain(reader)
    # Then
    assert shelf.shelf == ["a", "b"]
    assert shelf.released == ["a", "b"]
    assert states(bench) == {a: "closed", b: "closed"}


def test_twophase_i3_the_next_owner_releases_what_is_recorded_and_asks_nothing(bench: Bench) -> None:
    # Given: an owner that died between record and release
    shelf = Shelf(bench)
    shelf.down = True
    bench.emit("a")
    with pytest.raises(Unavailable):
        bench.drain(bench.reader(bench.claim(ttl=600.0), shelf))
    bench.die()
    # When: another one takes over, whose participant would answer "unknown" if it were asked
    after = Shelf(bench)
    bench.drain(bench.reader(sink=after))
    # Then
    assert after.shelf == []
    assert after.released == ["a"]
    assert bench.parked() == {}


def test_twophase_i3_what_is_recorded_is_never_in_doubt_when_the_next_owner_dies_too(bench: Bench) -> None:
    # Given: an owner that died between record and release, and one that died before it came that far again
    class Mortal(Shelf):
        def apply(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
            raise KeyboardInterrupt

    shelf = Shelf(bench)
    shelf.down = True
    bench.emit("a")
    with pytest.raises(Unavailable):
        bench.drain(bench.reader(sink=shelf))
    for sink in (Mortal(bench), Mortal(bench)):
        bench.die()
        with pytest.raises(KeyboardInterrupt):
            bench.drain(bench.reader(sink=sink))
    bench.die()
    # When: a third one comes, whose participant would answer "unknown" if it were asked
    after = Shelf(bench)
    bench.drain(bench.reader(sink=after))
    # Then
    assert after.released == ["a"]
    assert bench.parked() == {}


def test_twophase_i6_releases_nothing_when_its_epoch_is_stale(bench: Bench) -> None:
    # Given: an owner that is overtaken while it prepares
    class Slow(Shelf):
        def apply(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
            outcomes = super().apply(batch, position)
            bench.die()
            bench.claim()
            return outcomes

    shelf = Slow(bench)
    bench.emit("a")
    # When, then
    with pytest.raises(Fenced):
        bench.drain(bench.reader(sink=shelf))
    assert shelf.recorded == []
    assert shelf.released == []


def test_twophase_releases_the_prepared_part_of_what_will_be_tried_again(bench: Bench) -> None:
    # Given: an intent of which a part is prepared, and the rest fails
    shelf = Shelf(bench)
    shelf.fate["a"] = Outcome(Verdict.RETRY, {"shelf": "half"}, "later", prepared=True)
    number = bench.emit("a")
    # When
    reader = bench.reader(sink=shelf, backoff=None)
    bench.drain(reader)
    # Then: the part takes effect now, and the intent is tried again
    assert shelf.released == ["half"]
    assert states(bench) == {number: "partial"}
    assert bench.parked() == {"retry": ["a"]}
