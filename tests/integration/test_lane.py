"""A lane's lease at its end, and the connections that it is kept by."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import psycopg
import pytest

from outbox import lane as lanes
from outbox.database import connect
from outbox.errors import Fenced
from outbox.intent import Intent
from outbox.participant import APPLIED, Outcome
from outbox.position import Position
from tests.fixtures.lanes import TARGET, Bench, Sink, keys
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import until


def test_lane_i6_makes_no_effect_when_its_lease_may_have_run_out_and_another_has_the_lane(bench: Bench) -> None:
    # Given: an owner that lost its lane while it looked at nothing but its participant
    reader = bench.reader()
    bench.emit("k")
    bench.clock.step()
    bench.die()
    bench.claim()

    # When: it believes in its lease, and when it doesn't
    assert reader.lane.deadline > 0
    reader.lane.deadline = 0.0
    with pytest.raises(Fenced, match="has a new owner"):
        reader.step()

    # Then: nothing was made, although nothing at the participant would have refused it
    assert bench.sink.effects == []


def test_lane_i10_goes_on_when_its_lease_ran_out_and_nobody_else_wants_the_lane(bench: Bench) -> None:
    # Given: an owner that was suspended, or whose machine is slow, far beyond its lease
    reader = bench.reader()
    bench.emit("k")
    bench.die()
    reader.lane.deadline = 0.0

    # When
    bench.drain(reader)

    # Then: it asked, and has its lease again
    assert keys(bench.sink.effects) == ["k"]
    assert bench.admin.execute(
        "select epoch, lease_until > now() from outbox.lane where target = 'sink'"
    ).fetchone() == (1, True)


def test_lane_i6_participant_can_ask_before_each_effect_whether_the_lane_is_still_its(bench: Bench) -> None:
    # Given: a participant that is suspended between two effects of one batch, through a takeover
    class Careful(Sink):
        def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
            for intent in batch:
                self.lane.check()
                self.effects.append((intent.key, intent.payload))
                bench.die()
                bench.claim()
                reader.lane.deadline = 0.0
            return [APPLIED] * len(batch)

    sink = Careful()
    reader = bench.reader(sink=sink)
    for key in "abc":
        bench.emit(key)
    bench.clock.step()

    # When
    with pytest.raises(Fenced):
        bench.drain(reader)

    # Then: only the effect that it was in the middle of was made
    assert keys(sink.effects) == ["a"]
    assert bench.parked() == {}


def test_lane_i10_is_claimed_without_waiting_when_a_transaction_holds_its_row(bench: Bench, worker_url: str) -> None:
    # Given: an owner that is gone, and whose last transaction is still there
    left = bench.claim()
    bench.die()
    with psycopg.connect(worker_url) as conn:
        left.fence(conn)

        # When, Then: nobody is kept waiting by it, and nobody has the lane before it is over
        assert lanes.claim(bench.conn, TARGET, 0, owner=uuid.uuid4()) is None
        conn.rollback()
        assert lanes.claim(bench.conn, TARGET, 0, owner=uuid.uuid4()) is not None


def test_lane_i10_is_free_when_its_owner_was_cut_off_in_a_transaction(bench: Bench, worker_url: str) -> None:
    # Given: a worker's connection, which the server has as much patience with as it has itself
    with connect(worker_url, name="test", patience=90) as conn:
        setting = "select current_setting('idle_in_transaction_session_timeout')::interval = '90 s'"
        assert conn.execute(setting).fetchone() == (True,)
        conn.execute("set idle_in_transaction_session_timeout = '1 s'")
        left = bench.claim()
        bench.die()

        # When: it says nothing more in the middle of a transaction
        with pytest.raises(psycopg.Error), conn.transaction():
            left.fence(conn)
            until(lambda: lanes.claim(bench.conn, TARGET, 0, owner=uuid.uuid4()), "the lane can be claimed")
            left.fence(conn)

        # Then: the server has ended it
        assert conn.closed


def test_lane_position_is_written_by_the_next_owner_when_the_last_one_died_before_it_could(bench: Bench) -> None:
    # Given: a participant that keeps its own position, and an owner that died before it wrote the lane's
    class Keeper(Sink):
        keeps_position = True

    sink = Keeper()
    bench.emit("k")
    reader = bench.reader(sink=sink)
    reader._record = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bench.drain(reader)
    assert keys(sink.effects) == ["k"]
    bench.die()

    # When: the next owner finds nothing to do
    following = bench.reader(sink=sink)
    assert following.idle()

    # Then: those who wait for the lane's position are not kept waiting
    assert following.lane.stand(bench.conn) == sink.own
    assert keys(sink.effects) == ["k"]


def test_connection_i10_is_lost_when_the_server_does_not_answer(worker_url: str, proxy: Proxy, database: str) -> None:
    # Given: a network that confirms what it never hands on
    with connect(proxy.url("outbox_worker", database), name="test") as conn:
        conn.patience = 1
        proxy.swallow()

        # When, Then
        with pytest.raises(psycopg.OperationalError, match="no answer for 1 s"):
            conn.execute("select 2")
        assert conn.closed


def test_connection_waits_for_notifications_longer_than_for_an_answer(worker_url: str) -> None:
    with connect(worker_url, name="test") as conn:
        conn.patience = 0.2
        assert list(conn.notifies(timeout=0.6)) == []
        conn.patience = 600
        assert conn.execute("select 1").fetchone() == (1,)
