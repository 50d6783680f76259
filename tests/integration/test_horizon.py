"""A participant that is rebuilt from base and log, and one that is older than the log goes back."""

from __future__ import annotations

import random
import threading
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import horizon, lane, live, retention, tick
from outbox.errors import NotThisLog
from outbox.position import Position
from tests.fixtures.lanes import TARGET, Bench, Sink, keys
from tests.fixtures.retention import AGE, drop_all, fill, grow_old
from tests.fixtures.site import until as wait_until
from workers.clock import TICK_AGE, keep_house
from workers.index import IndexParticipant
from workers.reader import Reader


class Keeper(Sink):
    """A participant that keeps its own position, and what the last put of each key said."""

    keeps_position = True
    batch_limit = 3

    def content(self) -> dict[str, Any]:
        return dict(self.effects)


def _open(bench: Bench, keeper: Keeper) -> Reader:
    bench.give_up(TARGET)
    return bench.reader(sink=keeper)


def _dropped(bench: Bench, shelf: Path, keeper: Keeper, count: int = 10) -> Reader:
    """A log of which the first partition is gone, with `count` keys in the base."""
    reader = _open(bench, keeper)
    for n in range(count):
        bench.emit(f"old{n}", n)
    fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    assert len(drop_all(bench.conn, shelf)) == 1
    return reader


# ------------------------------------------------------------------------------------------ from nothing


def test_reader_i8_is_given_the_base_and_then_the_log_when_its_participant_holds_nothing(
    bench: Bench, shelf: Path
) -> None:
    _dropped(bench, shelf, Keeper())
    bench.emit("old3", 33)
    bench.emit("new", 1)
    new = Keeper()
    reader = _open(bench, new)
    bench.drain(reader)
    assert keys(new.effects) == [*(f"old{n}" for n in range(10)), "old3", "new"]
    assert new.content()["old3"] == 33


def test_reader_i8_goes_on_in_the_middle_of_the_base_when_it_is_killed_there(bench: Bench, shelf: Path) -> None:
    # Given a new participant that has got a part of the base
    _dropped(bench, shelf, Keeper())
    bench.emit("new", 1)
    new = Keeper()
    for after in (3, 6, 9):
        bench.drain_once(_open(bench, new))
        # Then its position says so, whoever reads on
        assert new.own is not None
        assert (new.own.tick, new.own.after) == (1, after)
        assert Position.parse(str(new.own)) == new.own
    bench.drain(_open(bench, new))
    assert keys(new.effects) == [*(f"old{n}" for n in range(10)), "new"]


def test_retention_i8_waits_for_a_lane_in_the_middle_of_the_base_so_that_it_loses_no_delete(
    bench: Bench, shelf: Path
) -> None:
    # Given a new participant that has got `old0` from the base
    _dropped(bench, shelf, Keeper())
    new = Keeper()
    reader = _open(bench, new)
    bench.drain_once(reader)
    assert "old0" in new.content()
    # When that key is deleted, and the partition that says so becomes old
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) values (%s, 'delete', 'old0', '{}')", (TARGET,)
    )
    fill(bench)
    grow_old(bench.admin)
    # Then it stays until the lane has read it
    assert [hold.kind for hold in retention.plan(bench.conn, AGE).holds] == ["lane"]
    bench.drain(reader)
    assert new.effects[-1] == ("old0", {})
    assert len(drop_all(bench.conn, shelf)) == 1


def test_retention_i8_waits_for_a_lane_as_soon_as_it_has_begun_anew(bench: Bench, shelf: Path) -> None:
    # Given a lane that has passed an old partition, and a copy of its participant from before that
    keeper = Keeper()
    reader = _open(bench, keeper)
    bench.emit("before", 1)
    bench.drain(reader)
    copied = keeper.own
    bench.emit("a", 1)
    fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    assert len(retention.plan(bench.conn, AGE).ready) == 1
    # When the copy, or one that holds nothing, is opened and has read nothing yet
    for own in (copied, None):
        again = Keeper()
        again.own = own
        reader = _open(bench, again)
        # Then the partition stays
        assert [hold.kind for hold in retention.plan(bench.conn, AGE).holds] == ["lane"]
        bench.drain(reader)
        reader.close()
        assert again.content()["a"] == 1
    assert len(drop_all(bench.conn, shelf)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_retention_i8_rebuilt_index_is_as_the_live_one_after_any_number_of_drops(
    bench: Bench, shelf: Path, tmp_path: Path, seed: int
) -> None:
    # Given an index that lives through puts, deletes, intents that can't be applied, and drops
    chance = random.Random(seed)
    site = _Index(bench, tmp_path / "live")
    for _ in range(chance.randrange(3, 6)):
        for _ in range(chance.randrange(5, 40)):
            site.emit(chance)
            if chance.random() < 0.2:
                site.drain()
            if chance.random() < 0.1:
                site.decide(chance)
        if chance.random() < 0.8:
            fill(bench)
        if chance.random() < 0.8:
            site.drain()
            grow_old(bench.admin)
            drop_all(bench.conn, shelf)
        if chance.random() < 0.3:
            site.reopen()
    # When everything that can't be applied is skipped, and another one is built from nothing
    site.decide(chance, all_of_them=True)
    site.drain()
    alive = site.inventory()
    new = _Index(bench, tmp_path / "new")
    new.drain()
    # Then it holds the same documents, from the same intents, and that is what base and log say
    assert new.inventory() == alive
    known = [(i.key, i.id) for i in live.puts(bench.conn, "index", tick.latest(bench.conn))]
    assert known == sorted((key, number) for key, _, number in alive)
    # Also if one more part is dropped
    fill(bench)
    new.drain()
    grow_old(bench.admin)
    assert drop_all(bench.conn, shelf)
    last = _Index(bench, tmp_path / "last")
    last.drain()
    assert last.inventory() == alive


class _Index:
    """The index of the bench's database in a directory."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self.bench, self.directory = bench, directory
        self.reopen()

    def reopen(self) -> None:
        self.bench.give_up("index")
        owned = lane.claim(self.bench.conn, "index", 0, owner=uuid.uuid4(), ttl=600)
        assert owned is not None
        self.participant = IndexParticipant(self.directory)
        self.reader = Reader(self.bench.conn, owned, self.participant)
        self.reader.open()

    def emit(self, chance: random.Random) -> None:
        key = f"k{chance.randrange(12)}"
        action, payload = chance.choice(
            [("put", f'{{"text": "{chance.random()}"}}')] * 6 + [("delete", "{}")] * 2 + [("put", '{"text": 5}')]
        )
        self.bench.admin.execute("select outbox.emit('index', %s, %s, %s)", (action, key, payload))

    def decide(self, chance: random.Random, *, all_of_them: bool = False) -> None:
        while True:
            rows = self.bench.admin.execute(
                "select id from outbox.parked where reason in ('poison', 'blocked') order by id"
            ).fetchall()
            poison = self.bench.admin.execute("select id from outbox.parked where reason = 'poison'").fetchall()
            for (number,) in poison if all_of_them or chance.random() < 0.5 else []:
                self.bench.admin.execute("select outbox.decide('skip', array[%s::bigint])", (number,))
            if not all_of_them or not rows:
                return
            self.reader.decided()
            self.drain()

    def drain(self) -> None:
        self.reader.decided()
        self.bench.drain(self.reader)
        self.reader._note_empty(at_once=True)

    def inventory(self) -> list[tuple[str, str, int]]:
        return sorted(self.participant.inventory())


# -------------------------------------------------------------------------------------- older than the log


def test_reader_i2_refuses_a_copy_that_is_older_than_the_log_goes_back(bench: Bench, shelf: Path) -> None:
    # Given a copy of a participant, and a partition that it had not passed and that is gone
    keeper = Keeper()
    reader = _open(bench, keeper)
    bench.emit("before", 1)
    bench.drain(reader)
    copied = keeper.own
    _dropped(bench, shelf, keeper)
    # When the copy is restored, then its lane stops, and says what to do; nothing is skipped
    keeper.own = copied
    with pytest.raises(NotThisLog, match="outbox resilver"):
        _open(bench, keeper)


def test_reader_goes_on_from_a_copy_when_the_log_goes_back_that_far(bench: Bench, shelf: Path) -> None:
    keeper = Keeper()
    _dropped(bench, shelf, keeper)
    copied = keeper.own
    reader = _open(bench, keeper)
    bench.emit("after", 1)
    bench.drain(reader)
    keeper.own = copied
    bench.drain(_open(bench, keeper))
    assert keys(keeper.effects)[-2:] == ["after", "after"]


def test_reader_i2_refuses_a_copy_that_had_a_part_of_a_base_that_was_dropped_upon_since(
    bench: Bench, shelf: Path
) -> None:
    # Given a copy that was made when its participant was in the middle of the base
    _dropped(bench, shelf, Keeper())
    new = Keeper()
    reader = _open(bench, new)
    bench.drain_once(reader)
    copied = new.own
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) values (%s, 'delete', 'old0', '{}')", (TARGET,)
    )
    fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    # When what it needs is dropped: the base doesn't have `old0` any more, and the log not its delete
    assert len(drop_all(bench.conn, shelf)) == 1
    new.own = copied
    with pytest.raises(NotThisLog, match="outbox resilver"):
        _open(bench, new)


def test_reader_is_not_refused_when_nothing_was_for_it_for_longer_than_the_log_goes_back(
    bench: Bench, shelf: Path
) -> None:
    # Given a participant whose own position is old, because only others had anything since
    keeper = Keeper()
    reader = _open(bench, keeper)
    bench.emit("mine", 1)
    bench.drain(reader)
    own = keeper.own
    bench.admin.execute("select outbox.register('other')")
    for _ in range(2):
        bench.admin.execute("select outbox.emit('other', 'touch', 'k')")
        fill(bench)
        bench.drain(reader)
    reader.close()
    bench.admin.execute(
        "insert into outbox.position (target, lane, epoch, tick) select 'other', 0, 1, max(id) from outbox.tick"
    )
    grow_old(bench.admin)
    assert len(drop_all(bench.conn, shelf)) == 2
    keep_house(bench.conn, None)
    # When it is opened again, by the next owner and the one after
    assert keeper.own == own
    for n in range(2):
        reader = _open(bench, keeper)
        bench.emit("more", n)
        bench.drain(reader)
    # Then it goes on, and nothing comes twice
    assert keeper.effects == [("mine", 1), ("more", 0), ("more", 1)]


def test_reader_i2_that_is_behind_the_lane_is_refused_when_the_horizon_moves_while_it_opens(
    bench: Bench, shelf: Path, server: Any
) -> None:
    # Given a copy that the log goes back to, and a drop that is under way and would change that
    keeper = Keeper()
    reader = _open(bench, keeper)
    bench.emit("before", 1)
    bench.drain(reader)
    copied = keeper.own
    for n in range(3):
        bench.emit("old", n)
    until = fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    (each,) = retention.plan(bench.conn, AGE).ready
    retention._archive(bench.conn, each, shelf, None, lambda _: None)
    bench.conn.execute("select outbox.carry(%s)", (until,))
    keeper.own = copied
    raised: list[BaseException] = []

    def opens() -> None:
        try:
            _open(bench, keeper)
        except NotThisLog as error:
            raised.append(error)

    thread = threading.Thread(target=opens)
    with psycopg.connect(server.url("outbox_worker", bench.conn.info.dbname)) as dropping:
        dropping.execute("select outbox.drop_partition(%s, '1 day')", (until,))
        # When the reader opens meanwhile
        thread.start()
        _until_waits(bench)
        dropping.commit()
    thread.join()
    # Then it is refused: what it needs is gone
    assert len(raised) == 1
    assert "outbox resilver" in str(raised[0])


def _until_waits(bench: Bench) -> None:
    def waits() -> bool:
        with psycopg.connect(bench.admin.info.dsn, autocommit=True) as conn:
            query = "select count(*) from pg_locks where not granted and locktype in ('advisory', 'relation')"
            row = conn.execute(query).fetchone()
        return bool(row and row[0])

    wait_until(waits, "the reader waits for the drop")


# --------------------------------------------------------------------------------------------------- ticks


def test_housekeeping_thins_ticks_before_the_horizon_and_keeps_the_first_and_the_horizons(
    bench: Bench, shelf: Path
) -> None:
    # Given ticks of several nonces, that is what is kept for ever without a horizon
    reader = bench.reader()
    for n in range(4):
        bench.clock._nonce_at -= 100
        bench.emit("k", n)
        bench.drain(reader)
    grow_old(bench.admin)
    query = "select id from outbox.tick order by id"
    before = [row[0] for row in bench.admin.execute(query)]
    keep_house(bench.conn, None)
    assert len(bench.admin.execute(query).fetchall()) > 4
    # And a horizon-to-be that is a tick like others: not the last of its nonce, and nobody stands there
    fill(bench)
    for n in range(3):
        bench.emit("k", n)
        bench.drain(reader)
    reader._note_empty(at_once=True)
    newest = tick.latest(bench.conn).id
    grow_old(bench.admin)
    # When the partition is gone
    drop_all(bench.conn, shelf)
    keep_house(bench.conn, None)
    # Then of those before the horizon only the first is left
    at = horizon.read(bench.conn)
    left = [row[0] for row in bench.admin.execute(query)]
    assert [number for number in left if number <= at.tick] == [before[0], at.tick]
    assert left[-1] == newest
    assert TICK_AGE == "1 hour"


def test_reader_i8_is_given_nothing_twice_when_a_partition_is_carried_and_not_dropped_yet(
    bench: Bench, shelf: Path
) -> None:
    # Given a partition that was carried into the base by a process that died then
    _dropped(bench, shelf, Keeper())
    reader = _open(bench, Keeper())
    bench.emit("old0", 33)
    bench.emit("new", 1)
    bench.admin.execute("select outbox.emit(%s, 'delete', 'old1')", (TARGET,))
    until = fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    (each,) = retention.plan(bench.conn, AGE).ready
    retention._archive(bench.conn, each, shelf, None, lambda _: None)
    bench.conn.execute("select outbox.carry(%s)", (until,))
    # When a participant begins from nothing, it gets base and log as if that had not been
    new = Keeper()
    bench.drain(_open(bench, new))
    assert keys(new.effects) == [*(f"old{n}" for n in range(2, 10)), "old0", "new", "old1"]
