"""The reader against real lanes: order, parking, retries, deaths, log matching."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest

from outbox import lane as lanes
from outbox import live, receipt, tick
from outbox.errors import Ambiguous, Fenced, NotThisLog, Permanent, Transient, Unavailable
from outbox.participant import Evidence, Outcome, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from tests.fixtures.lanes import TARGET, Bench, Sink, keep, keys
from workers.reader import Reader

RETRY = Outcome(Verdict.RETRY, error="not now")
POISON = Outcome(Verdict.POISON, error="never")


def test_reader_i2_applies_everything_once_when_read_in_small_pages(bench: Bench) -> None:
    bench.sink.batch_limit = 7
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) "
        "select 'sink', 'put', 'k' || n, to_jsonb(n) from generate_series(1, 100) n"
    )
    bench.drain(bench.reader())
    assert bench.sink.effects == [(f"k{n}", n) for n in range(1, 101)]
    assert len(bench.sink.settled) == 100


def test_reader_cuts_batches_by_bytes_when_payloads_are_large(bench: Bench) -> None:
    bench.sink.batch_bytes = 1000
    for n in range(10):
        bench.emit(f"k{n}", "x" * 400)
    bench.drain(bench.reader())
    assert bench.sink.batches == [2] * 5


def test_reader_goes_on_inside_a_batch_when_another_owner_takes_over(bench: Bench) -> None:
    bench.sink.batch_limit = 10
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) "
        "select 'sink', 'put', 'k' || n, to_jsonb(n) from generate_series(1, 100) n"
    )
    bench.clock.step()
    first = bench.reader()
    first.step()
    first.step()
    # Newer ticks come while the giant batch is half read.
    bench.emit("k101", 101)
    bench.clock.step()
    bench.die()
    bench.drain(bench.reader())
    assert [n for _, n in bench.sink.effects] == list(range(1, 102))


def test_reader_i4_parks_later_intents_of_a_key_behind_its_failed_head(bench: Bench) -> None:
    for n in range(1, 4):
        bench.emit("bad", n)
        bench.emit("good", n)
    bench.sink.fate["bad"] = POISON
    bench.drain(bench.reader())
    assert keys(bench.sink.effects) == ["good"] * 3
    assert bench.parked() == {"poison": ["bad"], "blocked": ["bad", "bad"]}


def test_reader_i4_lets_blocked_intents_go_in_order_when_the_head_succeeds(bench: Bench) -> None:
    bench.sink.fate["k"] = RETRY
    bench.emit("k", 1)
    reader = bench.reader(backoff=Backoff(first=3600, limit=3600))
    bench.drain(reader)
    for n in (2, 3):
        bench.emit("k", n)
    bench.drain(reader)
    assert bench.parked() == {"retry": ["k"], "blocked": ["k", "k"]}
    bench.sink.fate.clear()
    bench.emit("k", 4)
    bench.admin.execute("update outbox.parked set retry_at = outbox.now() where retry_at is not null")
    bench.drain(reader)
    assert bench.sink.effects == [("k", n) for n in (1, 2, 3, 4)]
    assert bench.parked() == {}
    bench.emit("k", 5)
    bench.drain(reader)
    assert bench.sink.effects[-1] == ("k", 5)


def test_reader_parks_as_poison_when_retries_are_used_up(bench: Bench) -> None:
    bench.sink.fate["k"] = RETRY
    bench.emit("k")
    bench.drain(bench.reader(backoff=Backoff(first=0, limit=0, attempts=4)))
    row = bench.admin.execute("select reason, attempts, error from outbox.parked").fetchone()
    assert row == ("poison", 4, "tried 4 times: not now")


def test_reader_waits_and_parks_nothing_when_the_participant_is_down(bench: Bench) -> None:
    bench.sink.fate["k"] = Unavailable("the disk is full: make room")
    bench.emit("k")
    bench.emit("other")
    reader = bench.reader()
    with pytest.raises(Unavailable):
        bench.drain(reader)
    assert bench.parked() == {}
    assert bench.sink.effects == []
    bench.sink.fate.clear()
    bench.drain(reader)
    assert keys(bench.sink.effects) == ["k", "other"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Permanent("bad"), "poison"),
        (Ambiguous("maybe"), "in_doubt"),
        (Transient("later"), "retry"),
        (KeyError("a bug"), "retry"),
    ],
)
def test_reader_isolates_one_intent_by_halving_when_a_batch_raises(bench: Bench, error: Exception, reason: str) -> None:
    for n in range(16):
        bench.emit(f"k{n}", n)
    bench.sink.fate["k11"] = error
    bench.drain(bench.reader(backoff=Backoff(first=3600, limit=3600)))
    assert bench.parked() == {reason: ["k11"]}
    assert sorted(n for _, n in bench.sink.effects) == [n for n in range(16) if n != 11]
    row = bench.admin.execute("select error from outbox.parked").fetchone()
    assert row is not None
    assert "a bug" not in row[0]


def test_reader_i4_applies_in_its_place_what_is_due_when_it_is_read(bench: Bench) -> None:
    # Given a scheduled put, and a later one of its key that came true first
    bench.sink.keeps_position = True
    bench.emit("k", "scheduled", due="2900-01-01")
    bench.emit("k", "at once")
    reader = bench.reader()
    bench.drain(reader)
    bench.conn.execute("set outbox.fake_now = '2901-01-01'")
    bench.drain(reader)
    reader.close()
    assert bench.sink.effects == [("k", "at once"), ("k", "scheduled")]
    assert bench.parked() == {}
    # When the participant has lost everything, and reads the log again
    bench.conn.execute("set outbox.fake_now = '2901-01-02'")
    bench.die()
    bench.admin.execute("update outbox.lane set owner = null, place = null, lease_until = null where target = 'sink'")
    empty = Sink()
    empty.keeps_position = True
    again = bench.reader(sink=empty)
    bench.emit("k2")
    bench.drain(again)
    # Then each is in its place, and the key ends with what base and log say of it
    assert empty.effects == [("k", "scheduled"), ("k", "at once"), ("k2", None)]
    assert [each.payload for each in live.puts(bench.conn, TARGET, tick.latest(bench.conn))] == ["at once", None]


def lose_everything(bench: Bench, **more: Any) -> tuple[Sink, Reader]:
    """The participant's own data is gone, and a new owner opens it."""
    empty = Sink()
    empty.keeps_position = True
    bench.give_up(TARGET)
    return empty, bench.reader(sink=empty, **more)


def test_reader_i3_applies_once_what_was_scheduled_when_its_participant_has_lost_everything(bench: Bench) -> None:
    # Given a scheduled put that is parked, and a participant that has lost everything when its time comes
    bench.sink.keeps_position = True
    bench.emit("k", "before")
    bench.emit("k", "scheduled", due="2900-01-01")
    bench.drain(bench.reader())
    assert bench.parked() == {"due": ["k"]}
    bench.conn.execute("set outbox.fake_now = '2901-01-01'")
    empty, again = lose_everything(bench)
    # When it reads the log again
    bench.drain(again)
    # Then it has each once, and nothing is left to do
    assert empty.effects == [("k", "before"), ("k", "scheduled")]
    assert bench.parked() == {}


def test_reader_i3_i4_applies_in_order_and_once_what_waits_for_a_retry_when_its_participant_has_lost_everything(
    bench: Bench,
) -> None:
    # Given a key of which the middle one failed, and is to be tried again
    bench.sink.keeps_position = True
    reader = bench.reader(backoff=Backoff(first=3600, limit=3600))
    bench.emit("k", 1)
    bench.drain(reader)
    bench.sink.fate["k"] = RETRY
    bench.emit("k", 2)
    bench.emit("k", 3)
    bench.drain(reader)
    assert bench.parked() == {"retry": ["k"], "blocked": ["k"]}
    # When the participant has lost everything, and reads the log again while the next try is due
    empty, again = lose_everything(bench)
    bench.admin.execute("update outbox.parked set retry_at = now() where reason = 'retry'")
    bench.drain(again)
    # Then it has each once, in the order of the log
    assert empty.effects == [("k", 1), ("k", 2), ("k", 3)]
    assert bench.parked() == {}


def test_reader_i3_leaves_what_is_parked_until_it_has_read_up_to_it_again(bench: Bench) -> None:
    # Given two keys of which the second one failed, in a participant that keeps its position
    bench.sink.keeps_position = True
    bench.sink.fate["b"] = RETRY
    reader = bench.reader(backoff=Backoff(first=3600, limit=3600))
    bench.emit("a")
    bench.drain(reader)
    bench.emit("b")
    bench.emit("c")
    bench.drain(reader)
    # When all is lost, and it reads again in small pages while the next try is due
    bench.admin.execute("update outbox.parked set retry_at = now()")
    empty, again = lose_everything(bench)
    empty.batch_limit = 1
    done = []
    for _ in range(3):
        again._parked_at = 0.0
        again.step()
        done.append(keys(empty.effects))
    # Then its turn comes as soon as its place is passed, and not before
    assert done[0] == ["a"]
    assert done[-1] == ["a", "b", "c"]
    bench.drain(again)
    assert keys(empty.effects) == ["a", "b", "c"]


def test_reader_i2_tries_again_what_failed_when_it_was_read_from_the_base(bench: Bench) -> None:
    # Given a key of which the log was dropped, and a participant that has lost everything and fails at it
    bench.emit("k", 1)
    bench.sink.keeps_position = True
    bench.drain(bench.reader())
    horizon = bench.emit("k2", 2)
    keep(bench, horizon, {"k": (horizon - 1, 1)})
    empty, again = lose_everything(bench)
    empty.fate["k"] = RETRY
    bench.drain_once(again)
    assert bench.parked() == {"retry": ["k"]}
    # When the next try succeeds
    empty.fate.clear()
    bench.drain(again)
    # Then nothing is left
    assert sorted(empty.effects) == [("k", 1), ("k2", 2)]
    assert bench.parked() == {}


def test_reader_keeps_a_scheduled_intent_until_it_is_due(bench: Bench) -> None:
    bench.emit("k", "later", due=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    bench.emit("k", "now")
    reader = bench.reader()
    bench.drain(reader)
    assert bench.sink.effects == [("k", "now")]
    assert bench.parked() == {"due": ["k"]}
    assert reader.idle()
    bench.conn.execute("select set_config('outbox.fake_now', (now() + interval '2 h')::text, false)")
    reader.lane.deadline += 1e6
    assert not reader.idle()
    bench.drain(reader)
    assert reader.idle()
    assert bench.sink.effects == [("k", "now"), ("k", "later")]
    assert bench.parked() == {}


@pytest.mark.parametrize("payload", ["1e5000", "[" * 1200 + "]" * 1200])
def test_reader_parks_a_payload_that_python_cannot_read(bench: Bench, payload: str) -> None:
    bench.admin.execute("select outbox.emit('sink', 'put', 'odd', %s::jsonb)", (payload,))
    bench.emit("fine", 1)
    bench.drain(bench.reader())
    assert keys(bench.sink.effects) == ["fine"]
    assert bench.parked() == {"poison": ["odd"]}


def test_reader_i6_writes_nothing_when_its_epoch_is_stale(bench: Bench) -> None:
    stale = bench.reader()
    bench.die()
    fresh = bench.reader(sink=Sink())
    bench.emit("k")
    bench.clock.step()
    with pytest.raises(Fenced):
        stale.step()
    assert bench.admin.execute("select count(*) from outbox.position where epoch = 1").fetchone() == (0,)
    bench.drain(fresh)
    assert bench.admin.execute("select count(*) > 0 from outbox.position where epoch = 2").fetchone() == (True,)


class KillerDied(BaseException):
    """Stands for the death of the process: nothing catches it."""


class Deadly(Sink):
    """Kills its process when it meets the key `killer`."""

    def apply(self, batch, position):  # type: ignore[no-untyped-def]
        if any(intent.key == "killer" for intent in batch):
            raise KillerDied
        return super().apply(batch, position)


def test_reader_parks_the_intent_that_kills_its_worker_and_only_that(bench: Bench) -> None:
    for n in range(60):
        bench.emit("killer" if n == 41 else f"k{n}", n)
    bench.clock.step()
    sink = Deadly()
    sink.batch_limit = 32
    deaths = 0
    while True:
        reader = bench.reader(sink=sink)
        try:
            bench.drain(reader)
            break
        except KillerDied:
            deaths += 1
            bench.die()
            assert deaths < 40
    assert bench.parked() == {"poison": ["killer"]}
    assert sorted(n for _, n in sink.effects) == [n for n in range(60) if n != 41]
    assert bench.admin.execute("select deaths from outbox.lane where target = 'sink'").fetchone() == (0,)


def test_reader_parks_nothing_when_workers_are_killed_while_the_participant_is_down(bench: Bench) -> None:
    bench.sink.batch_limit = 2
    bench.sink.fate["k"] = Unavailable("down")
    bench.emit("k", 1)
    bench.clock.step()
    for _ in range(20):
        reader = bench.reader()
        with pytest.raises(Unavailable):
            reader.step()
        reader.lane.show(bench.conn, "waiting", "down")
        bench.die()
    bench.sink.fate.clear()
    bench.drain(bench.reader())
    assert bench.parked() == {}
    assert bench.sink.effects == [("k", 1)]


def test_reader_parks_nothing_when_workers_are_killed_at_random(bench: Bench) -> None:
    bench.sink.batch_limit = 4
    for n in range(200):
        bench.emit(f"k{n}", n)
    bench.clock.step()
    for _ in range(30):  # dies after each step: much progress, no culprit
        bench.reader().step()
        bench.die()
    bench.drain(bench.reader())
    assert bench.parked() == {}
    assert [n for _, n in bench.sink.effects] == list(range(200))


# ---------------------------------------------------------------------------------------- own positions


class Keeper(Sink):
    """Keeps its own position, like an index."""

    keeps_position = True


def test_reader_catches_up_by_itself_when_the_participant_is_older_than_the_lane(bench: Bench) -> None:
    keeper = Keeper()
    bench.emit("a", 1)
    bench.drain(bench.reader(sink=keeper))
    backup = keeper.own
    bench.emit("b", 2)
    bench.die()
    bench.drain(bench.reader(sink=keeper))
    restored = Keeper()
    restored.own = backup
    bench.die()
    bench.drain(bench.reader(sink=restored))
    assert restored.effects == [("b", 2)]


def test_reader_starts_from_the_beginning_when_the_participant_is_empty(bench: Bench) -> None:
    bench.emit("a", 1)
    bench.drain(bench.reader(sink=Keeper()))
    bench.die()
    empty = Keeper()
    bench.drain(bench.reader(sink=empty))
    assert empty.effects == [("a", 1)]


def test_reader_catches_up_from_the_nearest_kept_tick_when_its_own_was_thinned(bench: Bench) -> None:
    keeper = Keeper()
    reader = bench.reader(sink=keeper)
    for n in range(6):
        bench.emit(f"k{n}", n)
        bench.drain(reader)
        if n == 2:
            backup = keeper.own
    ticks = bench.admin.execute("select count(*) from outbox.tick").fetchone()
    bench.conn.execute("delete from outbox.tick t where exists (select from outbox.tick n where n.id > t.id and "
                       "n.nonce = t.nonce)")  # fmt: skip
    assert bench.admin.execute("select count(*) from outbox.tick").fetchone() < ticks  # type: ignore[operator]
    restored = Keeper()
    restored.own = backup
    bench.die()
    bench.drain(bench.reader(sink=restored))
    assert {3, 4, 5} <= {n for _, n in restored.effects}


@pytest.mark.parametrize("what", ["log", "nonce", "future"])
def test_reader_refuses_when_the_position_is_of_another_history(bench: Bench, what: str) -> None:
    keeper = Keeper()
    bench.emit("a")
    bench.drain(bench.reader(sink=keeper))
    own = keeper.own
    assert own is not None
    keeper.own = {
        "log": own._replace(log="f" * 16),
        "nonce": own._replace(nonce="f" * 16),
        "future": own._replace(tick=own.tick + 1000),
    }[what]
    bench.die()
    with pytest.raises(NotThisLog, match="Nothing was skipped"):
        bench.reader(sink=keeper)


def test_reader_i2_parks_before_any_position_passes_a_failed_intent(bench: Bench) -> None:
    """A kept position that ran ahead of the parking place would lose the intent in a crash between the two."""
    keeper = Keeper()
    keeper.fate["bad"] = POISON
    bench.emit("good", 1)
    bench.emit("bad", 2)
    bench.clock.step()
    reader = bench.reader(sink=keeper)
    before = keeper.own
    reader._record = lambda *_: (_ for _ in ()).throw(KillerDied())  # type: ignore[method-assign]
    with pytest.raises(KillerDied):
        reader.step()
    assert keeper.own == before
    bench.die()
    bench.drain(bench.reader(sink=keeper))
    assert bench.parked() == {"poison": ["bad"]}
    # Once it is parked, the kept position passes it too: a restart doesn't bring it back.
    bench.admin.execute("delete from outbox.parked")
    bench.die()
    bench.drain(bench.reader(sink=keeper))
    assert bench.parked() == {}


# ------------------------------------------------------------------------------- recorded attempts


class Ambivalent(Sink):
    """Its effects can't be made twice harmlessly, like mail."""

    records_attempts = True

    def __init__(self) -> None:
        super().__init__()
        self.die_after_effect = False

    def apply(self, batch, position):  # type: ignore[no-untyped-def]
        outcomes = super().apply(batch, position)
        if self.die_after_effect:
            self.die_after_effect = False
            raise KillerDied
        return outcomes


@pytest.mark.parametrize(
    ("evidence", "times", "parked"),
    [(Evidence.APPLIED, 1, {}), (Evidence.NOT_APPLIED, 2, {}), (Evidence.UNKNOWN, 1, {"in_doubt": ["k"]})],
)
def test_reader_i3_asks_what_became_of_an_attempt_when_its_worker_died(
    bench: Bench, evidence: Evidence, times: int, parked: dict[str, list[str]]
) -> None:
    sink = Ambivalent()
    sink.die_after_effect = True
    number = bench.emit("k", 1)
    bench.clock.step()
    with pytest.raises(KillerDied):
        bench.drain(bench.reader(sink=sink))
    sink.probed[number] = evidence
    bench.die()
    bench.drain(bench.reader(sink=sink))
    assert len(sink.effects) == times
    assert bench.parked() == parked


def test_reader_i3_makes_no_effect_again_when_its_receipt_is_closed(bench: Bench) -> None:
    sink = Ambivalent()
    bench.emit("k", 1)
    reader = bench.reader(sink=sink)
    bench.drain(reader)
    # As if the position had been lost (a crash of a server that lied about its disk): the receipt still tells.
    bench.admin.execute("delete from outbox.position")
    bench.die()
    bench.drain(bench.reader(sink=sink))
    assert sink.effects == [("k", 1)]


def test_reader_keeps_what_is_known_of_a_partial_attempt_until_it_is_done(bench: Bench) -> None:
    sink = Ambivalent()
    sink.fate["k"] = Outcome(Verdict.RETRY, {"accepted": [0]}, "one recipient deferred")
    bench.emit("k", 1)
    reader = bench.reader(sink=sink, backoff=Backoff(first=3600, limit=3600))
    bench.drain(reader)
    row = bench.admin.execute("select state, evidence from outbox.receipt").fetchone()
    assert row == ("partial", {"accepted": [0]})
    assert receipt.doubts(bench.conn, reader.lane) == []
    sink.fate.clear()
    bench.admin.execute("update outbox.parked set retry_at = outbox.now()")
    bench.drain(reader)
    assert list(sink.receipts.values()) == [{"accepted": [0]}]
    assert bench.admin.execute("select state from outbox.receipt").fetchone() == ("closed",)


def test_reader_forgets_an_attempt_when_it_is_known_to_have_had_no_effect(bench: Bench) -> None:
    sink = Ambivalent()
    sink.fate["k"] = RETRY
    bench.emit("k", 1)
    bench.drain(bench.reader(sink=sink, backoff=Backoff(first=3600, limit=3600)))
    assert bench.admin.execute("select count(*) from outbox.receipt").fetchone() == (0,)


# --------------------------------------------------------------------------------------------- lanes


def test_lane_is_taken_at_once_when_its_owner_on_this_machine_is_gone(bench: Bench) -> None:
    import subprocess
    import sys

    where = subprocess.run(
        [sys.executable, "-c", "from outbox.lane import place; print(place())"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    bench.claim(ttl=3600)
    assert lanes.claim(bench.conn, "sink", 0, owner=uuid.uuid4()) is None
    bench.admin.execute("update outbox.lane set place = %s where target = 'sink'", (where,))
    assert bench.claim().unclean


def test_lane_is_not_taken_when_its_owner_is_on_another_machine_and_its_lease_lasts(bench: Bench) -> None:
    bench.claim(ttl=3600)
    bench.admin.execute("update outbox.lane set place = 'elsewhere/boot/ns/1/1' where target = 'sink'")
    assert lanes.claim(bench.conn, "sink", 0, owner=uuid.uuid4()) is None
    bench.conn.execute("select set_config('outbox.fake_now', (now() + interval '2 h')::text, false)")
    assert bench.claim().epoch == 2


def test_lane_release_frees_it_for_the_next_owner(bench: Bench) -> None:
    bench.claim(ttl=3600).release(bench.conn)
    lane = bench.claim()
    assert not lane.unclean
    assert lane.deaths == 0


def test_position_prints_and_parses() -> None:
    for position in (Position("0" * 16, 5, "a" * 16), Position("0" * 16, 5, "a" * 16, 6, 77)):
        assert Position.parse(str(position)) == position
    with pytest.raises(ValueError, match="not a position"):
        Position.parse("5")


def test_reader_parks_a_parked_intent_that_kills_its_worker_each_time_it_is_tried(bench: Bench) -> None:
    bench.sink.fate["killer"] = bench.sink.fate["other"] = RETRY
    bench.emit("killer")
    bench.emit("other", 1)
    bench.drain(bench.reader(backoff=Backoff(first=3600, limit=3600)))
    sink = Deadly()
    for _ in range(10):
        bench.admin.execute("update outbox.parked set retry_at = outbox.now() where reason = 'retry'")
        bench.die()
        reader = bench.reader(sink=sink)
        try:
            bench.drain(reader)
        except KillerDied:
            continue
    assert bench.parked() == {"poison": ["killer"]}
    assert sink.effects == [("other", 1)]
    row = bench.admin.execute("select error from outbox.parked").fetchone()
    assert row == ("killed its worker 3 times",)


def test_reader_gives_the_next_its_turn_when_an_operator_removed_the_head_by_hand(bench: Bench) -> None:
    bench.sink.fate["k"] = POISON
    bench.emit("k", 1)
    bench.emit("k", 2)
    reader = bench.reader()
    bench.drain(reader)
    assert bench.parked() == {"poison": ["k"], "blocked": ["k"]}
    bench.sink.fate.clear()
    bench.admin.execute("delete from outbox.parked where reason = 'poison'")
    reader._blocked_at = 0.0
    bench.drain(reader)
    bench.emit("k", 3)
    reader._blocked_at = 0.0
    bench.drain(reader)
    assert bench.sink.effects == [("k", 2), ("k", 3)]
    assert bench.parked() == {}
